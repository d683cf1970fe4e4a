"""Checkpoint folders: complete or absent."""

import pytest

from rlver_dist.checkpoints import CheckpointStore, Progress, choose
from rlver_dist.errors import DataError


def progress(iteration: int) -> Progress:
    return Progress(
        iteration=iteration,
        sampler={"epoch": 1},
        totals={"dialogues_total": 8.0},
        curve=[30.0, 31.5],
        before={"emotion": [1.0]},
        warmed_up=True,
        control={"emotion": [0.5]},
        kl_coef=0.1,
        wall_s=12.5,
        shape={"model.path": "tiny", "critic.head_units": "8"},
    )


def write(store: CheckpointStore, iteration: int):
    aside = store.begin(iteration)
    (aside / "weights").write_text(str(iteration))
    return store.commit(aside, progress(iteration))


def test_round_trip_and_newest_wins(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (2, 10):
        write(store, iteration)
    newest = store.latest()
    assert newest is not None and newest.name == "step_10"
    assert CheckpointStore.read(newest) == progress(10)


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (1, 2, 3):
        write(store, iteration)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_2", "step_3"]


def test_resuming_an_older_checkpoint_leaves_the_newer_line(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for iteration in (4, 8, 10, 5):
        write(store, iteration)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_4", "step_5"]
    newest = store.latest()
    assert newest is not None and newest.name == "step_5"


def test_an_unfinished_checkpoint_does_not_exist(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    (store.begin(2) / "weights").write_text("half")
    assert store.latest() == tmp_path / "checkpoints" / "step_1"


def test_choose(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    assert choose(store, "auto", (), {}) is None and choose(store, "never", ("policy",), {}) is None
    first = write(store, 1)
    assert choose(store, "auto", (), {}) == first
    assert choose(store, str(first), (), {}) == first
    with pytest.raises(DataError, match="resume=auto"):
        choose(store, "never", (), {})
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        choose(store, str(tmp_path), (), {})
    (first / "policy").mkdir()
    assert choose(store, "auto", ("policy",), {}) == first
    with pytest.raises(DataError, match="holds no critic; use the recipe"):
        choose(store, "auto", ("policy", "critic"), {})


def test_another_runs_checkpoint_starts_a_folder_of_its_own(tmp_path):
    theirs = write(CheckpointStore(tmp_path / "theirs", keep=2), 3)
    ours = CheckpointStore(tmp_path / "ours", keep=2)
    assert choose(ours, str(theirs), (), {}) == theirs
    write(ours, 1)
    with pytest.raises(
        DataError, match=r"step_3: of another run, and .*ours/checkpoints/step_1 exists; use resume=auto .* another output_dir"
    ):
        choose(ours, str(theirs), (), {})


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    first = write(store, 1)
    # Options that only one of the two has, such as a critic's, are for `learners` to judge.
    assert choose(store, "auto", (), {"model.path": "tiny", "model.dtype": "float32"}) == first
    with pytest.raises(DataError, match=r"^model\.path=big: .*step_1 was written with model\.path=tiny; use that, or another output_dir$"):
        choose(store, "auto", (), {"model.path": "big"})


def test_a_broken_manifest_is_named(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    path = write(store, 1)
    (path / "manifest.json").write_text('{"iteration": 1}')
    with pytest.raises(DataError, match=r"manifest\.json"):
        CheckpointStore.read(path)
