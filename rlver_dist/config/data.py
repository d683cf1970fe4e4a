"""Options of who the simulated users are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Who the simulated users are."""

    train: str = "bank"
    """Training personas: `bank` (shipped with the package) or a JSONL file, in this project's or RLVER's
    format."""
    evaluation: str = "bank"
    """Evaluation personas: `bank` or a JSONL file."""
