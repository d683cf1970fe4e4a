"""The run's metrics as Ray metrics: the dashboard's `/metrics` and Prometheus see every key of
docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayMetrics:
    """One gauge a key, `rlver_` before it and `_` for `/`, tagged with the run's folder."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Publish one iteration's values; those that are not finite are left out, as Prometheus would draw
        them as gaps anyway."""
        for key, value in metrics.items():
            name = "rlver_" + key.replace("/", "_")
            # Keys come and go with the run's stages; a gauge is made when its key is first seen.
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=key, tag_keys=("run",))
            if math.isfinite(value):
                self._gauges[name].set(value, tags={"run": self._run})

    def close(self) -> None:
        """Ray forgets the gauges with the process."""
