"""Options of the guards against reward hacking; `experience/guards.py` says what each of them measures."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial

from rlver_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """One guard: nothing is taken off up to `start`, `penalty` from `full` on, and a linear share in
    between."""

    start: float
    """Measure up to which a dialogue is paid in full; beyond it the dialogue counts as flagged, whether the
    guard is on or off."""
    full: float
    """Measure from which the whole penalty is taken off."""
    penalty: float = 0.0
    """Largest reward (0 to 1) that this guard takes off a dialogue; 0 switches it off and leaves its
    metrics."""


@dataclass(kw_only=True, slots=True)
class GuardsConfig:
    """Guards against reward hacking, each off unless it has a penalty. The bounds leave the replies of sound
    policies alone; see docs/metrics.md, `guard/`, for what was measured."""

    repetition: GuardConfig = field(default_factory=partial(GuardConfig, start=0.01, full=0.1))
    """Share of the other personas' dialogues in which a 4-gram of the replies occurs, mean over its
    4-grams."""
    loops: GuardConfig = field(default_factory=partial(GuardConfig, start=0.15, full=0.5))
    """Share of 4-grams that the same dialogue's replies hold already."""
    redundancy: GuardConfig = field(default_factory=partial(GuardConfig, start=0.7, full=0.9))
    """Share of the replies' bytes that compression saves."""
    non_words: GuardConfig = field(default_factory=partial(GuardConfig, start=0.05, full=0.3))
    """Share of words and symbols that belong to no language."""
    length: GuardConfig = field(default_factory=partial(GuardConfig, start=150.0, full=400.0))
    """Words a reply."""
    max_penalty: float = 0.5
    """Most reward that all guards together take off a dialogue; it never falls below 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_penalty <= 1:
            raise ConfigError(f"algorithm.guards.max_penalty={self.max_penalty}: use a value from 0 to 1")
        for name, guard in self.by_name().items():
            key = f"algorithm.guards.{name}"
            if not 0 <= guard.penalty <= 1:
                raise ConfigError(
                    f"{key}.penalty={guard.penalty}: use a value from 0 to 1; 0 switches the guard off"
                )
            if guard.start < 0:
                raise ConfigError(f"{key}.start={guard.start}: use 0 or more")
            # Both at one value would divide by 0 where the penalty rises between them.
            if not guard.start < guard.full:
                raise ConfigError(f"{key}.full={guard.full}: use a value above {key}.start={guard.start}")

    def by_name(self) -> dict[str, GuardConfig]:
        """Every guard, by the name of its measure."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, GuardConfig)}
