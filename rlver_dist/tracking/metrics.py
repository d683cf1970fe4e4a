"""`Metric` records and their single reduction.

Every component reports what it counted as records with a weight, and `reduce_metrics` combines them once an
iteration. Means are weighted by what they were taken over (tokens, dialogues, requests), so that a mean over
unequal shards is the mean over all their elements and not the mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import Any

NON_FINITE = "progress/non_finite"
Summary = dict[str, Any]
"""The content of `summary.json`, or of a comparison in it: numbers, lists, and further ones by key."""


class Reduction(str, Enum):
    """How records with the same key become one number."""

    mean = "mean"
    """Sum of weight x value over sum of weights."""
    max = "max"
    sum = "sum"
    last = "last"
    """The record that comes last in the list."""


@dataclass(slots=True, frozen=True)
class Metric:
    """One number that a component reports.

    Attributes:
        key: `group/name`, as listed in docs/metrics.md.
        value: in the key's unit.
        reduction: see `Reduction`; one key has one reduction.
        weight: elements that `value` is the mean of; positive, 0 where there were none; only `Reduction.mean`
            reads it.

    Raises:
        ValueError: the weight is negative or not finite, or the key is kept for `reduce_metrics`.
    """

    key: str
    value: float
    reduction: Reduction
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(
                f"metric {self.key}: weight={self.weight}; use a finite number of elements, 0 or more"
            )
        if self.key == NON_FINITE:
            raise ValueError(f"metric {self.key}: counted by reduce_metrics; report it under another key")


def mean_metric(key: str, values: Sequence[float]) -> Metric:
    """The mean of `values` with their number as weight; where there are none it is 0 and weighs nothing."""
    return Metric(key, fmean(values) if values else 0.0, Reduction.mean, weight=len(values))


def reduce_metrics(metrics: Iterable[Metric]) -> dict[str, float]:
    """Combine records into one number a key, in order of first appearance.

    Args:
        metrics: records from every component of one iteration.

    Returns:
        One number a key. NaN and infinity are kept as they are, and `progress/non_finite` says how many
            records carried one (0 where all are finite). A mean whose weights sum to zero is a mean of
            nothing: it is NaN, and is not counted.

    Raises:
        ValueError: two records of one key differ in reduction.
    """
    groups: dict[str, list[Metric]] = {}
    non_finite = 0
    for metric in metrics:
        group = groups.setdefault(metric.key, [])
        if group and group[0].reduction is not metric.reduction:
            raise ValueError(
                f"metric {metric.key}: reported with reductions {group[0].reduction.value} and "
                f"{metric.reduction.value}; use one"
            )
        group.append(metric)
        non_finite += not math.isfinite(metric.value)
    reduced = {key: _reduce(group) for key, group in groups.items()}
    reduced[NON_FINITE] = float(non_finite)
    return reduced


def _reduce(group: list[Metric]) -> float:
    values = [float(metric.value) for metric in group]
    match group[0].reduction:
        case Reduction.mean:
            total = math.fsum(metric.weight for metric in group)
            if total == 0:
                return math.nan
            # A plain sum: fsum raises where infinities of both signs meet, and a weight of 0 must not hide a
            # NaN.
            return sum(metric.weight * value for metric, value in zip(group, values, strict=True)) / total
        case Reduction.max:
            return math.nan if any(math.isnan(value) for value in values) else max(values)
        case Reduction.sum:
            return float(sum(values))
        case Reduction.last:
            return values[-1]
