"""Checkpoint folders: complete or absent."""

import shutil
from pathlib import Path

import pytest

from rlver_dist.errors import DataError
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.files import write_whole
from rlver_dist.trainer import checkpoints
from rlver_dist.trainer.checkpoints import (
    WARM_START,
    CheckpointStore,
    Progress,
    copy_warm_start,
    select_checkpoint,
)


def held_out(emotion: float) -> HeldOut:
    return HeldOut(
        persona_ids=["p1"],
        emotion=[emotion],
        second_emotion=[None],
        distinct2=0.5,
        perplexity=9.0,
        well_formed=1.0,
        failed=0,
    )


def progress(iteration: int, warmed_up: bool = False) -> Progress:
    return Progress(
        iteration=iteration,
        sampler={"epoch": 1},
        totals={"dialogues_total": 8.0},
        curve=[30.0, 31.5],
        before=held_out(1.0),
        finished_phases={"control": "limits"},
        warmed_up=warmed_up,
        control=held_out(0.5) if warmed_up else None,
        kl_coef=0.1,
        wall_s=12.5,
        shape={"model.path": "tiny", "critic.head_units": "8"},
    )


def write(store: CheckpointStore, iteration: int, warmed_up: bool = False):
    aside = store.begin(iteration)
    (aside / "weights").write_text(str(iteration))
    return store.commit(aside, progress(iteration, warmed_up))


def test_round_trip_and_newest_wins(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for iteration in (2, 10):
        write(store, iteration, warmed_up=iteration == 10)
    newest = store.latest()
    assert newest is not None and newest.name == "step_10"
    assert CheckpointStore.read(newest) == progress(10, warmed_up=True)
    assert CheckpointStore.read(newest.with_name("step_2")) == progress(2)


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
    assert (
        select_checkpoint(store, "auto", (), {}) is None
        and select_checkpoint(store, "never", ("policy",), {}) is None
    )
    first = write(store, 1)
    assert select_checkpoint(store, "auto", (), {}) == first
    assert select_checkpoint(store, str(first), (), {}) == first
    with pytest.raises(DataError, match="resume=auto"):
        select_checkpoint(store, "never", (), {})
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        select_checkpoint(store, str(tmp_path), (), {})
    (first / "policy").mkdir()
    assert select_checkpoint(store, "auto", ("policy",), {}) == first
    with pytest.raises(DataError, match="holds no critic; use the recipe"):
        select_checkpoint(store, "auto", ("policy", "critic"), {})


def test_another_runs_checkpoint_starts_a_folder_of_its_own(tmp_path):
    theirs = write(CheckpointStore(tmp_path / "theirs", keep=2), 3)
    ours = CheckpointStore(tmp_path / "ours", keep=2)
    assert select_checkpoint(ours, str(theirs), (), {}) == theirs
    write(ours, 1)
    with pytest.raises(
        DataError,
        match=r"step_3: of another run, and .*ours/checkpoints/step_1 exists; use resume=auto .* another "
        r"output_dir",
    ):
        select_checkpoint(ours, str(theirs), (), {})


def warm_start(folder: Path, name: str) -> Path:
    """A warmed-up policy in a run's folder."""
    made = folder / WARM_START
    made.mkdir(parents=True)
    (made / "weights").write_text(name)
    return made


def test_a_warmed_up_checkpoint_comes_with_the_policy_that_it_began_with(tmp_path):
    plain = write(CheckpointStore(tmp_path / "plain", keep=2), 1)
    assert copy_warm_start(plain, tmp_path / "ours") is None and not (tmp_path / "ours").exists()
    theirs = write(CheckpointStore(tmp_path / "theirs", keep=2), 3, warmed_up=True)
    began = warm_start(tmp_path / "theirs", "theirs")
    assert copy_warm_start(theirs, tmp_path / "theirs") == began
    # A start of ours that ended before its first checkpoint left a warm-up behind.
    ours = warm_start(tmp_path / "ours", "ours")
    assert copy_warm_start(theirs, tmp_path / "ours") == ours
    assert (ours / "weights").read_text() == (began / "weights").read_text() == "theirs"
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [WARM_START]


def test_a_warmed_up_checkpoint_that_was_copied_alone_is_refused(tmp_path):
    alone = write(CheckpointStore(tmp_path, keep=2), 3, warmed_up=True)
    with pytest.raises(
        DataError,
        match=r"^resume=.*step_3: .*/warm_start, the policy .* is missing; copy it along .* another "
        r"output_dir$",
    ):
        select_checkpoint(CheckpointStore(tmp_path, keep=2), "auto", (), {})
    warm_start(tmp_path, "ours")
    assert select_checkpoint(CheckpointStore(tmp_path, keep=2), "auto", (), {}) == alone


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    first = write(store, 1)
    # Options that only one of the two has, such as a critic's, are for `learners` to judge.
    assert select_checkpoint(store, "auto", (), {"model.path": "tiny", "model.dtype": "float32"}) == first
    with pytest.raises(
        DataError,
        match=r"^model\.path=big: .*step_1 was written with model\.path=tiny; use that, or another "
        r"output_dir$",
    ):
        select_checkpoint(store, "auto", (), {"model.path": "big"})


@pytest.mark.parametrize("content", ['{"iteration": 1}', "[1]", '{"before": {"emotion": [1.0]}}', "{"])
def test_a_broken_manifest_is_named(tmp_path, content):
    path = write(CheckpointStore(tmp_path, keep=2), 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is not a checkpoint's manifest \("):
        CheckpointStore.read(path)


class Killed(BaseException):
    """The process ends here."""


class Mortal:
    """Counts file operations of `checkpoints`, and kills before the one with number `fatal`, or in the midst
    of it where it deletes."""

    def __init__(self, monkeypatch, fatal: int, midst: bool) -> None:
        self.done, self._fatal, self._midst = 0, fatal, midst
        self._rename, self._write, self._rmtree = Path.rename, write_whole, shutil.rmtree
        monkeypatch.setattr(Path, "rename", lambda path, target: self._do(lambda: self._rename(path, target)))
        monkeypatch.setattr(
            checkpoints, "write_whole", lambda path, text: self._do(lambda: self._write(path, text))
        )
        monkeypatch.setattr(checkpoints.shutil, "rmtree", self._delete)

    def _do(self, operation) -> None:
        if self.done == self._fatal:
            raise Killed
        self.done += 1
        operation()

    def _delete(self, path, ignore_errors=False) -> None:
        if self.done == self._fatal and self._midst:
            # Files go in any order: the manifest may be what is left.
            (path / "weights").unlink()
        self._do(lambda: self._rmtree(path, ignore_errors=ignore_errors))


def line(store: CheckpointStore, name: str, *iterations: int) -> None:
    """Save `iterations` with weights that say which line of training they belong to."""
    for iteration in iterations:
        aside = store.begin(iteration)
        (aside / "weights").write_text(f"{name}{iteration}")
        store.commit(aside, progress(iteration))


@pytest.mark.parametrize("midst", [False, True])
@pytest.mark.parametrize(
    ("earlier", "then", "keep", "before", "left"),
    [
        ([0], 0, 2, "a0", ["step_0"]),
        ([1, 2], 3, 2, "a2", ["step_2", "step_3"]),
        ([4, 8, 10], 8, 3, "a10", ["step_4", "step_8"]),
        ([4, 8, 10], 6, 1, "a10", ["step_6"]),
    ],
    ids=["the same step again", "one more", "a left line with the same step", "a left line"],
)
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, earlier, then, keep, before, left, midst
):
    root = tmp_path / "run" / "checkpoints"
    for fatal in range(100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        # Kept all, as by a run that did not know that it would be left.
        line(CheckpointStore(tmp_path / "run", keep=9), "a", *earlier)
        with pytest.MonkeyPatch.context() as monkeypatch:
            mortal = Mortal(monkeypatch, fatal, midst)
            try:
                line(CheckpointStore(tmp_path / "run", keep), "b", then)
            except Killed:
                written = mortal.done > 0
            else:
                break
        newest = CheckpointStore(tmp_path / "run", keep).latest()
        assert newest is not None
        # From the moment that the manifest is there, nothing else counts.
        assert (newest / "weights").read_text() == (f"b{then}" if written else before)
        assert CheckpointStore.read(newest).iteration == (then if written else earlier[-1])
        assert select_checkpoint(CheckpointStore(tmp_path / "run", keep), str(newest), (), {}) == newest
        line(CheckpointStore(tmp_path / "run", keep), "c", then)
        assert sorted(path.name for path in root.iterdir()) == left
        assert (root / f"step_{then}" / "weights").read_text() == f"c{then}"
    # The manifest, the rename, and what had to go.
    assert 2 < fatal < 100


def test_a_save_that_was_interrupted_is_deleted_by_the_next_one_of_any_step(tmp_path):
    (CheckpointStore(tmp_path, keep=2).begin(5) / "weights").write_text("half")
    line(CheckpointStore(tmp_path, keep=2), "a", 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_10"]
