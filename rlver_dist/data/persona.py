"""`Persona`: who the simulated user is, what happened to them, and what they secretly want from the talk.

Taxonomy as in RLVER and SAGE (arXiv:2505.02847, section 2.2): eight hidden intents in two families, three
temperaments.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class HiddenIntent(str, Enum):
    """What the user wants from the talk and does not say. The first four are rational, the others
    emotional."""

    BALANCED_VIEW = "balanced_view"
    PRACTICAL_ADVICE = "practical_advice"
    UNDERSTAND_OTHERS = "understand_others"
    SELF_REFLECTION = "self_reflection"
    PRAISE = "praise"
    BE_HEARD = "be_heard"
    DEEP_EMPATHY = "deep_empathy"
    NO_FAULT = "no_fault"


class Temperament(str, Enum):
    """How the user takes things: attacks, gives in, or plays down."""

    NEGATIVE = "negative"
    PASSIVE = "passive"
    AVOIDANT = "avoidant"


@dataclass(kw_only=True, slots=True, frozen=True)
class Persona:
    """One simulated user.

    Attributes:
        id: unique within its file.
        name: what the user is called.
        profile: the person sheet (age, occupation, hobbies, habits, manner of speaking).
        scene: what happened, to whom, what was tried, how things stand; never the hidden intent.
        temperament: how the user takes things.
        traits: three trait words.
        hidden_intent: what the user wants from the talk and does not say.
        want: the hidden intent in this scene's terms.
        hides: what the user admits late or never.
        language: BCP 47 primary tag, "en" or "zh".
        topic: one line that says what the scene is about; empty where the source has none.
        situation_id: the seed situation of the scene; personas that share it share the events.
        opening: the user's first message; empty where the simulator has to make one.
        facts: first-person sentences that the user reveals message by message, surface first; empty where the
            source has none.
    """

    id: str
    name: str
    profile: str
    scene: str
    temperament: Temperament
    traits: tuple[str, ...]
    hidden_intent: HiddenIntent
    want: str
    hides: str
    language: str
    topic: str
    situation_id: str
    opening: str
    facts: tuple[str, ...]
