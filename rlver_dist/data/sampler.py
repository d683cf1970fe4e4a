"""`PersonaSampler`: which personas come next, in seeded, restorable, shuffled epochs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from rlver_dist.data.persona import Persona
from rlver_dist.data.personas import dump_personas
from rlver_dist.errors import DataError


class PersonaSampler:
    """Draws personas without replacement; every epoch goes through all of them in an order of its own.

    The order is a function of (seed, epoch) alone, so that the state is three numbers and a fingerprint of
    the personas. It does not depend on the platform.
    """

    def __init__(self, personas: Sequence[Persona], seed: int) -> None:
        if not personas:
            raise DataError("sampler: there is no persona to draw from; check data.train")
        self._personas = tuple(personas)
        # Once: 48,000 personas take longer to hash than an iteration has time for.
        self._fingerprint = hashlib.sha256(dump_personas(self._personas).encode()).hexdigest()
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled()

    def next(self, n: int) -> list[Persona]:
        """The next `n` personas; goes on into the next epoch where this one runs out."""
        drawn: list[Persona] = []
        while len(drawn) < n:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._shuffled()
            drawn.append(self._personas[self._order[self._position]])
            self._position += 1
        return drawn

    def state(self) -> dict[str, int | str]:
        """JSON-able state; `restore` goes on from it exactly."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "personas": self._fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with its seed.

        Raises:
            DataError: the state was made for other personas.
        """
        # Positions in another list would name other people, and nobody would notice.
        if state["personas"] != self._fingerprint:
            raise DataError(
                "sampler: the saved state belongs to other personas than data.train gives now; restore the "
                "personas of the saved run, or start a new run"
            )
        self._seed = state["seed"]
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        # A text as the seed: Python hashes it in the same way on every platform and mixes both numbers.
        order = list(range(len(self._personas)))
        random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order
