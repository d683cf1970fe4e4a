"""Checkpoint folders: written aside, renamed when complete, found again, pruned.

`checkpoints/step_<n>/` holds the learner's own files and `manifest.json`: the number of finished iterations
and everything that the driver needs to go on. The manifest is written last, and whole: a folder that has one
is complete, any other one does not exist. `step_0` has a manifest alone: before training the learners are as
the model's folder, or the warm-up's, makes them, so what was done until then costs nothing to keep.

    step_<n>.tmp   being written; with a manifest it is the newest checkpoint, and what a kill left undone of
                   its `commit` is done by whoever reads next
    step_<n>.old   being deleted
    failed_step_<n>  kept for study after a sync in which engines and learner did not agree
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlver_dist.errors import DataError
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.files import whole_folder, write_whole
from rlver_dist.preflight.folders import MANIFEST, check_resume

WARM_START = "warm_start"
"""Folder of the policy that the warm-up made, beside `checkpoints/`; with a KL term it is the reference."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a run has done so far, without the learner's tensors.

    Attributes:
        iteration: finished iterations.
        sampler: the persona sampler's state (`PersonaSampler.state`).
        totals: running sums for `progress/` metrics.
        curve: mean final emotion of each iteration's dialogues.
        before: results of the evaluation before training; None until it has run.
        finished_phases: phases before training whose dialogues are complete in the ledger, by name, and the
            limits they were held under.
        warmed_up: the format warm-up has run.
        control: results before it; None until they are there, and where there is no warm-up.
        kl_coef: weight of the KL term in the next iteration.
        wall_s: seconds that the run has taken so far, earlier starts included.
        shape: options that what is saved fits (`RunConfig.resume_fingerprint`), and the ranks of each learner
            (`Layout.ranks`).
    """

    iteration: int
    sampler: dict[str, Any]
    totals: dict[str, float]
    curve: list[float]
    before: HeldOut | None
    finished_phases: dict[str, str]
    warmed_up: bool
    control: HeldOut | None
    kl_coef: float
    wall_s: float
    shape: dict[str, str]


class CheckpointStore:
    """The checkpoints of one output folder."""

    # Not `whole_folder`, whose folder aside is worth nothing until the rename: here the ranks of the learners
    # write into it between `begin` and `commit`, and from the moment that its manifest is there it is the
    # newest checkpoint, which a kill before the rename must not cost and the next reader brings to its place.

    def __init__(self, output_dir: Path, keep: int) -> None:
        self._root = output_dir / "checkpoints"
        self._keep = keep

    def begin(self, iteration: int) -> Path:
        """An empty folder aside, for the learner's files; deletes what interrupted saves of any step left."""
        # First of all what is whole: deleting it with the rest would lose the newest checkpoint.
        self._settle()
        self._delete("tmp")
        aside = self._root / f"step_{iteration}.tmp"
        aside.mkdir(parents=True)
        return aside

    def commit(self, aside: Path, progress: Progress) -> Path:
        """Add the manifest, rename into place, and drop all checkpoints but this and the ones just before
        it."""
        write_whole(aside / MANIFEST, json.dumps(asdict(progress)))
        return self._finish(aside)

    def set_aside(self, aside: Path, progress: Progress) -> Path:
        """Keep a state that is not to be trusted as `failed_step_<n>`: it is resumed only where it is named,
        and drops no checkpoint."""
        kept = self._root / f"failed_{aside.with_suffix('').name}"
        shutil.rmtree(kept, ignore_errors=True)
        # Before the manifest: a folder aside that has one counts as a checkpoint.
        aside.rename(kept)
        write_whole(kept / MANIFEST, json.dumps(asdict(progress)))
        return kept

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        self._settle()
        complete = self._complete()
        return complete[-1] if complete else None

    def _settle(self) -> None:
        """Finish a commit that was interrupted, and delete what was being deleted."""
        for manifest in list(self._root.glob(f"step_*.tmp/{MANIFEST}")):
            self._finish(manifest.parent)
        self._delete("old")

    def _finish(self, aside: Path) -> Path:
        """Bring the complete checkpoint in `aside` to its place; interrupted anywhere and begun again, it
        ends in the same state."""
        self._delete("old")
        final = aside.with_suffix("")
        # Steps from this one on belong to a line of training that was left by resuming an older checkpoint,
        # or to an earlier save.
        for left in [path for path in self._complete() if _step(path) >= _step(final)]:
            left.rename(left.with_suffix(".old"))
        aside.rename(final)
        for older in self._complete()[: -self._keep]:
            older.rename(older.with_suffix(".old"))
        self._delete("old")
        return final

    def _delete(self, suffix: str) -> None:
        for folder in list(self._root.glob(f"step_*.{suffix}")):
            # A file system may refuse while somebody reads in there: the next save tries again.
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        found = [
            path.parent
            for path in self._root.glob(f"step_*/{MANIFEST}")
            if path.parent.name.removeprefix("step_").isdigit()
        ]
        return sorted(found, key=_step)

    @staticmethod
    def read(checkpoint: Path) -> Progress:
        """The manifest of a checkpoint.

        Raises:
            DataError: there is none, or it is not of this format.
        """
        manifest = checkpoint / MANIFEST
        try:
            return _progress(json.loads(manifest.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"resume={checkpoint}: {manifest} is not a checkpoint's manifest ({error}); name a folder "
                f"step_<n>"
            ) from error


def _progress(fields: object) -> Progress:
    """What `asdict` made JSON of; null for what has not been measured.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"a JSON object is missing, there is {type(fields).__name__}")
    for name in ("before", "control"):
        if fields.get(name) is not None:
            fields[name] = HeldOut(**fields[name])
    return Progress(**fields)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def select_checkpoint(
    store: CheckpointStore, resume: str, learners: Sequence[str], shape: Mapping[str, str]
) -> Path | None:
    """The checkpoint to go on from under `resume` (see `RunConfig.resume`), None to start anew.

    Args:
        store: of the run's folder.
        resume: the option.
        learners: names of the learners whose state it has to hold.
        shape: options that this state has to fit.

    Raises:
        DataError: `never` or one of another run, but the folder has a checkpoint; the named folder is none;
            it lacks a learner or the policy that the warm-up made; or it fits other options.
    """
    chosen = _newest_or_named(store, resume)
    if chosen is None:
        return None
    lacking = [name for name in learners if not (chosen / name).is_dir()]
    # Before the first iteration there is nothing of the learners to save.
    if lacking and store.read(chosen).iteration > 0:
        raise DataError(
            f"resume={resume}: {chosen} holds no {lacking[0]}; use the recipe that it was written by, or "
            f"another output_dir"
        )
    _require_fit(chosen, store.read(chosen).shape, shape)
    warm_start_of(chosen)
    return chosen


def warm_start_of(checkpoint: Path) -> Path | None:
    """The warmed-up policy that the run of `checkpoint` began with; None where there was no warm-up.

    Raises:
        DataError: it is missing.
    """
    if not CheckpointStore.read(checkpoint).warmed_up:
        return None
    # In the folder of the run that wrote it, which may be another one.
    folder = checkpoint.resolve().parent.parent / WARM_START
    if not folder.is_dir():
        raise DataError(
            f"resume={checkpoint}: {folder}, the policy that its warm-up made, is missing; copy it along "
            f"with the checkpoint, or start "
            "anew in another output_dir"
        )
    return folder


def copy_warm_start(checkpoint: Path, output_dir: Path) -> Path | None:
    """`warm_start_of` the checkpoint, copied to `output_dir` where the checkpoint is of another run."""
    theirs = warm_start_of(checkpoint)
    ours = output_dir.resolve() / WARM_START
    if theirs is None or theirs == ours:
        return theirs
    # A folder that is already there is of a start that never came to a checkpoint, so it may be replaced.
    with whole_folder(ours) as aside:
        shutil.copytree(theirs, aside, dirs_exist_ok=True)
    return ours


def _require_fit(checkpoint: Path, written: Mapping[str, str], shape: Mapping[str, str]) -> None:
    # Options that the checkpoint does not note, such as a critic's, are judged by its folders.
    for key, value in shape.items():
        if written.get(key, value) != value:
            raise DataError(
                f"{key}={value}: {checkpoint} was written with {key}={written[key]}; use that, or another "
                f"output_dir"
            )


def _newest_or_named(store: CheckpointStore, resume: str) -> Path | None:
    newest = store.latest()
    if resume == "auto":
        return newest
    if resume == "never":
        if newest is not None:
            raise DataError(
                f"resume=never: {newest} exists; use resume=auto to go on from it, or another output_dir"
            )
        return None
    check_resume(resume)
    # One folder would hold two lines of training, and `auto` could not tell which one goes on.
    if newest is not None and not Path(resume).resolve().parent.samefile(newest.parent):
        raise DataError(
            f"resume={resume}: of another run, and {newest} exists; use resume=auto to go on from that, or "
            f"another output_dir"
        )
    return Path(resume)
