"""An iteration in numbers: how long its phases took, and everything that its trackers get."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rlver_dist.dialogue import Dialogue
from rlver_dist.tracking.metrics import Metric, Reduction, reduce_metrics


class Clock:
    """Seconds of an iteration's phases, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """End the phase `name`."""
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Seconds of all phases that have ended."""
        return sum(self.laps.values())


def count_up(totals: Mapping[str, float], dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """The run's `progress/` totals with one more iteration's dialogues."""
    more = {"dialogues_total": len(dialogues), "sampled_tokens_total": _sampled_tokens(dialogues)}
    return {**totals, **{key: totals.get(key, 0) + count for key, count in more.items()}}


def iteration_metrics(
    number: int,
    dialogues: Sequence[Dialogue],
    metrics: Sequence[Metric],
    *,
    clock: Clock,
    totals: Mapping[str, float],
    left_s: float,
) -> dict[str, float]:
    """One number a key of docs/metrics.md.

    Args:
        number: finished iterations, this one included.
        dialogues: all of the iteration, failed ones included: their tokens were sampled, too.
        metrics: what all components reported.
        clock: of the iteration, with the phase `rollout` among its own.
        totals: see `count_up`.
        left_s: seconds until the end of the run.
    """
    return reduce_metrics(
        [
            # Means of all components meet here and nowhere before, so that each is weighted once.
            *metrics,
            *(Metric(f"time/{name}_s", seconds, Reduction.last) for name, seconds in clock.laps.items()),
            # What trackers and checkpoints take comes after all phases and counts to none.
            Metric("time/iteration_s", clock.total_s, Reduction.last),
            Metric("time/left_s", left_s, Reduction.last),
            Metric(
                "perf/rollout_tokens_per_s",
                _sampled_tokens(dialogues) / clock.laps["rollout"],
                Reduction.last,
            ),
            Metric("progress/iteration", number, Reduction.last),
            *(Metric(f"progress/{key}", total, Reduction.last) for key, total in totals.items()),
        ]
    )


def _sampled_tokens(dialogues: Sequence[Dialogue]) -> int:
    return sum(len(turn.reply_ids) for dialogue in dialogues for turn in dialogue.turns)
