"""Sums of per-token numbers over an update, as metrics."""

from __future__ import annotations

from rlver_dist.tracking.metrics import Metric, Reduction


class Tally:
    """Pools means by adding their sums and counts, so that a micro-batch weighs by its tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """Add a `total` over `count` elements to `name`."""
        pooled = self._sums.setdefault(name, [0.0, 0.0])
        pooled[0] += total
        pooled[1] += count

    def merge(self, other: Tally) -> None:
        """Add what `other` holds."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def metrics(self, prefix: str) -> list[Metric]:
        """One weighted mean a name; a mean of nothing has weight 0."""
        return [
            Metric(prefix + name, total / count if count else 0.0, Reduction.mean, count)
            for name, (total, count) in self._sums.items()
        ]
