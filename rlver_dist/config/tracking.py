"""Options of what is written down."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.enums import WandbMode


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """What is written down."""

    wandb: WandbMode = WandbMode.auto
    """Weights & Biases; `metrics.jsonl` and the Parquet ledger are always written."""
    project: str = "rlver_dist"
    """W&B project."""
    name: str = ""
    """W&B run name; empty takes the output folder's name."""
