"""Checks that every group of options uses: one line that names the key, the value and the way out."""

from __future__ import annotations

from rlver_dist.errors import ConfigError


def require(holds: bool, key: str, value: object, way_out: str) -> None:
    """Raise `ConfigError` naming `key`, `value` and the way out unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}={value}: {way_out}")


def at_least(minimum: float, group: str, **values: float) -> None:
    """Raise `ConfigError` for the first of `values` below `minimum`."""
    for key, value in values.items():
        require(value >= minimum, f"{group}{key}", value, f"use {minimum:g} or more")


def positive(group: str, **values: float) -> None:
    """Raise `ConfigError` for the first of `values` that is not above 0."""
    for key, value in values.items():
        require(value > 0, f"{group}{key}", value, "use a number above 0")
