"""What a run leaves behind, read from its `output_dir` or from a folder of `docs/results`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlver_dist.errors import DataError
from rlver_dist.tracking.jsonl import read_metrics


@dataclass(kw_only=True, slots=True, frozen=True)
class RunFiles:
    """A finished run.

    Attributes:
        name: of its folder.
        config: `config.yaml`; runs of earlier versions lack some keys.
        summary: `summary.json`.
        metrics: `metrics.jsonl`, one mapping an iteration.
        held_out: `held_out.json`, None where the run wrote none.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, float]]
    held_out: dict[str, Any] | None

    @property
    def recipe(self) -> str:
        """Name of the recipe in `conf/exp`: the algorithm, and whether it thinks."""
        # Runs from before there were thoughts have no such key.
        think = self.config["rollout"].get("think", False)
        return f"{self.config['algorithm']['name']}_{'think' if think else 'no_think'}"

    def series(self, key: str) -> list[float]:
        """Values of a metric in the order of the iterations, empty where the run does not have it."""
        return [line[key] for line in self.metrics if key in line]


def load_run(folder: Path) -> RunFiles:
    """Read the files of a finished run.

    Raises:
        DataError: a file other than `held_out.json` is missing, as in a run that has not ended.
    """
    for name in ("config.yaml", "summary.json"):
        if not (folder / name).is_file():
            raise DataError(f"{folder}: no {name}; name the folder of a run that has ended")
    held_out = folder / "held_out.json"
    return RunFiles(
        name=folder.resolve().name,
        config=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        summary=json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        metrics=read_metrics(folder / "metrics.jsonl"),
        held_out=json.loads(held_out.read_text(encoding="utf-8")) if held_out.is_file() else None,
    )
