"""Which personas the embedded users can speak for; without torch, so that a run can ask before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from rlver_dist.data.persona import Persona
from rlver_dist.errors import DataError

LANGUAGE = "en"


def check_personas(personas: Iterable[Persona]) -> None:
    """Refuse personas that this backend cannot speak for.

    Raises:
        DataError: names the first such persona, the field and the way out.
    """
    way_out = "the simulated users need English personas with an opening and facts; use data.train=bank and data.evaluation=bank"
    for persona in personas:
        if persona.language != LANGUAGE:
            raise DataError(f"persona {persona.id}: language={persona.language}: {way_out}")
        for field, value in (("opening", persona.opening), ("facts", persona.facts)):
            if not value:
                raise DataError(f"persona {persona.id}: {field} is empty: {way_out}")
