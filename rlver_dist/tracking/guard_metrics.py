"""Metrics of the guards against reward hacking: the `guard/` keys of docs/metrics.md, and rewards before
them."""

from __future__ import annotations

from rlver_dist.experience.guards import Guarded
from rlver_dist.tracking.metrics import Metric, mean_metric


def guard_metrics(guarded: Guarded) -> list[Metric]:
    """Each guard's mean measure and the share of dialogues that it flags, on or off; means carry the number
    of dialogues as weight."""
    metrics = [
        mean_metric("reward/before_guards", list(guarded.before.values())),
        mean_metric(
            "reward/guard_penalty", [guarded.before[id] - after for id, after in guarded.after.items()]
        ),
    ]
    for name, measures in guarded.measures.items():
        metrics.append(mean_metric(f"guard/{name}", list(measures.values())))
        metrics.append(mean_metric(f"guard/{name}_flagged", [id in guarded.flagged[name] for id in measures]))
    return metrics
