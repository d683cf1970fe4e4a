"""Metrics of the guards against reward hacking: the `guard/` keys of docs/metrics.md, and rewards before
them."""

from __future__ import annotations

from statistics import fmean

from rlver_dist.experience.guards import Guarded
from rlver_dist.tracking.metrics import Metric, Reduction


def guard_metrics(guarded: Guarded) -> list[Metric]:
    """Each guard's mean measure and the share of dialogues that it flags, on or off; means carry the number
    of dialogues as weight."""
    metrics = [
        _mean("reward/before_guards", list(guarded.before.values())),
        _mean("reward/guard_penalty", [guarded.before[id] - after for id, after in guarded.after.items()]),
    ]
    for name, measures in guarded.measures.items():
        metrics.append(_mean(f"guard/{name}", list(measures.values())))
        metrics.append(_mean(f"guard/{name}_flagged", [id in guarded.flagged[name] for id in measures]))
    return metrics


def _mean(key: str, values: list) -> Metric:
    return Metric(key, fmean(values) if values else 0.0, Reduction.mean, weight=len(values))
