"""What a finished run writes and shows: `summary.json`, `held_out.json`, dialogues before and after."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rlver_dist.dialogue import Dialogue
from rlver_dist.evaluation.held_out import HeldOut, compare
from rlver_dist.files import write_whole
from rlver_dist.ledger.parquet import dialogues_path, read_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.tracking.metrics import Summary
from rlver_dist.trainer.checkpoints import Progress

NUM_PAIRS_SHOWN = 2


def write_results(
    output: Path, progress: Progress, after: HeldOut | None, *, wall_s: float, bootstrap_samples: int
) -> Summary:
    """Write both files.

    Args:
        output: the run's folder.
        progress: of the run, with the results before training.
        after: results after it; None where evaluation is off.
        wall_s: seconds that the run has taken.
        bootstrap_samples: resamples of the intervals.

    Returns:
        The content of `summary.json`.
    """
    before, control = progress.before, progress.control
    summary: Summary = {"iterations": progress.iteration, "curve": progress.curve, "wall_s": wall_s}
    if after is not None:
        held_out = {
            "control": None if control is None else asdict(control),
            "before": None if before is None else asdict(before),
            "after": asdict(after),
        }
        _write_json(output / "held_out.json", held_out)
    if after is not None and before is None:
        summary |= {"after": statistics.fmean(after.emotion), "num_eval_personas": len(after.emotion)}
    if after is not None and before is not None:
        # Comparisons stand first, where a reader of the file looks for them.
        summary = {**compare(before, after, bootstrap_samples), **summary}
        # Without the warm-up there was no policy between the control's and the one before training.
        if control is not None and progress.warmed_up:
            summary["warm_up"] = compare(control, before, bootstrap_samples)
    _write_json(output / "summary.json", summary)
    return summary


def shown_pairs(output: Path, iterations: int) -> list[tuple[Dialogue, Dialogue]]:
    """Dialogues with the same held-out users before training and after so many iterations; none where one of
    the two was not held here."""
    first = _by_persona(dialogues_path(output, phase=Phase.before, iteration=0))
    last = _by_persona(dialogues_path(output, phase=Phase.after, iteration=iterations))
    return [(first[persona], last[persona]) for persona in first if persona in last][:NUM_PAIRS_SHOWN]


def _by_persona(path: Path) -> dict[str, Dialogue]:
    """Dialogues of one evaluation; none where a run goes on from another folder's checkpoint."""
    return {} if not path.exists() else {dialogue.persona_id: dialogue for dialogue in read_dialogues(path)}


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    write_whole(path, json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    """`value` with null for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
