"""Which of several equal members gets a call: the one that knows the prefix, unless it is dead or far busier
than the others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

SLACK = 1.25
"""Most load of a member, as a multiple of the mean; lower balances better, higher keeps more prefixes where
they are cached."""


class Router:
    """Consistent hashing with bounded loads (Mirrokni et al. 2018, arXiv:1608.01350, section 1): each
    affinity has its own order of members, equal in every process, and goes to the first one that is below the
    bound.

    Attributes:
        load: calls in flight, by member.
        dead: members that get no more calls.
    """

    def __init__(self, size: int) -> None:
        self.load = [0] * size
        self.dead: set[int] = set()

    def pick(self, affinity: str) -> int | None:
        """The member for a call; None where all are dead."""
        alive = self.alive()
        if not alive:
            return None
        # The call at hand counts as well, so that at least one member is below the bound.
        bound = math.ceil(SLACK * (sum(self.load[member] for member in alive) + 1) / len(alive))
        order = sorted(alive, key=lambda member: _rank(affinity, member))
        return next(member for member in order if self.load[member] < bound)

    def alive(self) -> list[int]:
        """The members that are not dead."""
        return [member for member in range(len(self.load)) if member not in self.dead]

    @contextmanager
    def call(self, member: int) -> Iterator[None]:
        """Count one call in flight on `member`."""
        self.load[member] += 1
        try:
            yield
        finally:
            self.load[member] -= 1


class HomeRouter(Router):
    """Each affinity goes to the least loaded member and stays there, however busy that gets, until the member
    dies."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._home: dict[str, int] = {}

    def pick(self, affinity: str) -> int | None:
        """The affinity's home, a new one where it has none that lives; None where all are dead."""
        # A cached prefix is worth more than an even load: elsewhere the whole history is computed again.
        home = self._home.get(affinity)
        if home is None or home in self.dead:
            alive = self.alive()
            if not alive:
                return None
            home = self._home[affinity] = min(alive, key=lambda member: self.load[member])
        return home

    def forget(self) -> None:
        """Let every affinity go anywhere."""
        self._home.clear()


def _rank(affinity: str, member: int) -> bytes:
    """Place of `member` in the affinity's order (rendezvous hashing): a member's death moves only its own
    affinities."""
    # Not `hash`, which differs from process to process.
    return hashlib.blake2b(f"{affinity}/{member}".encode(), digest_size=8).digest()
