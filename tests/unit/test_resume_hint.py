"""What a run that stopped early tells its user to type."""

from rlver_dist.trainer.run import resume_hint
from tests.unit.test_checkpoints import CheckpointStore, write


def test_another_runs_checkpoint_is_named_until_there_is_an_own_one(tmp_path, monkeypatch):
    elsewhere = f"resume={tmp_path}/other/checkpoints/step_20"
    monkeypatch.setattr("sys.argv", ["launch", "+exp=ppo_think", elsewhere, "output_dir=somewhere"])
    store = CheckpointStore(tmp_path / "run", keep=1)

    def hint(start_checkpoint):
        return resume_hint(store, start_checkpoint, output_dir=f"{tmp_path}/run", save_every=5)

    start = hint(None)
    assert start.startswith("stopped with no new checkpoint yet (save_every=5); start again with: ")
    assert start.endswith(f"-m rlver_dist.launch +exp=ppo_think {elsewhere} output_dir={tmp_path}/run")
    newest = write(store, 22)
    assert hint(None).startswith("stopped with step_22 saved; go on with: ")
    assert hint(None).endswith(f"-m rlver_dist.launch +exp=ppo_think output_dir={tmp_path}/run")
    # The newest one was there already: the run goes on from an older one, whose line would be left.
    assert hint(newest) == start
