"""The reward service's counts as metrics: the `simulator/` keys of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlver_dist.tracking.metrics import Metric, Reduction

LARGEST = ("_max", "_max_s", "_p50_s", "_p95_s", "_p99_s")
"""Percentiles of all requests cannot be had from each replica's own; the worst replica's stand for them."""
MEANS = ("_mean", "_mean_s")


def service_metrics(replicas: Sequence[Mapping[str, float]]) -> list[Metric]:
    """Metrics of all replicas.

    Args:
        replicas: `RewardServiceActor.metrics` of each one that lives. Names that end as `LARGEST` are reduced
            to the largest, those that end as `MEANS` to the mean weighted by `requests`, all others are added
            up.
    """
    metrics = [Metric("simulator/replicas", len(replicas), Reduction.last)]
    metrics += [
        _metric(name, value, values["requests"]) for values in replicas for name, value in values.items()
    ]
    prompt, cached = (
        sum(values.get(f"chat_{kind}_tokens", 0.0) for values in replicas) for kind in ("prompt", "cached")
    )
    # Users by rules have no prompts, and a share of nothing is left out.
    if prompt > 0:
        metrics.append(Metric("simulator/prefix_cache_hit", cached / prompt, Reduction.last))
    return metrics


def _metric(name: str, value: float, requests: float) -> Metric:
    key = f"simulator/{name}"
    if name.endswith(LARGEST):
        return Metric(key, value, Reduction.max)
    if name.endswith(MEANS):
        return Metric(key, value, Reduction.mean, requests)
    return Metric(key, value, Reduction.sum)
