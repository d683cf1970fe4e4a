"""Latencies as metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

QUANTILES = (0.50, 0.95, 0.99)


def latency_metrics(prefix: str, latencies_s: Sequence[float]) -> dict[str, float]:
    """Mean, quantiles and maximum of latencies.

    Args:
        prefix: first part of every key.
        latencies_s: in any order, seconds.

    Returns:
        `<prefix>_mean_s`, `<prefix>_p50_s`, `<prefix>_p95_s`, `<prefix>_p99_s` and `<prefix>_max_s`, seconds;
            nothing where there is no latency.
    """
    if not latencies_s:
        return {}
    ordered = sorted(latencies_s)
    return {
        f"{prefix}_mean_s": sum(ordered) / len(ordered),
        **{f"{prefix}_p{quantile * 100:.0f}_s": nearest_rank(ordered, quantile) for quantile in QUANTILES},
        f"{prefix}_max_s": ordered[-1],
    }


def nearest_rank(ordered: Sequence[float], quantile: float) -> float:
    """A quantile by the nearest-rank rule, which always gives one of the values.

    Args:
        ordered: at least one value, ascending.
        quantile: 0 to 1.
    """
    # The rank counts from 1; quantile 0 is the first value.
    return ordered[max(math.ceil(quantile * len(ordered)), 1) - 1]
