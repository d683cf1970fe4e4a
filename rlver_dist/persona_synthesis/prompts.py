"""The prompts of the two calls, in the persona's language, and the persona that their answers make."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from rlver_dist.data.people import with_article
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Message, Role
from rlver_dist.persona_synthesis.schema import Fields
from rlver_dist.persona_synthesis.seeds import LANGUAGES, Slot, Subject

SEPARATOR = {"en": ", ", "zh": "\u3001"}


def person_messages(slot: Slot) -> tuple[Message, ...]:
    """Asks for the person sheet."""
    prompts = _prompts(slot.language)
    asked = prompts["person_user"].format(
        name=slot.name,
        age=slot.age,
        occupation=slot.occupation,
        temperament=prompts["temperaments"][slot.temperament.value],
        traits=SEPARATOR[slot.language].join(slot.traits),
    )
    return Message(role=Role.SYSTEM, text=prompts["person_system"]), Message(role=Role.USER, text=asked)


def scene_messages(slot: Slot, person: Fields, subject: Subject) -> tuple[Message, ...]:
    """Asks for the scene of a person whose sheet is written. What a model wrote enters by one substitution
    and is never a template."""
    prompts = _prompts(slot.language)
    asked = prompts["scene_user"].format(
        profile=profile(slot, person),
        temperament=prompts["temperaments"][slot.temperament.value],
        theme=subject.theme,
        spark=subject.spark,
        intent=prompts["intents"][slot.intent.value],
    )
    return Message(role=Role.SYSTEM, text=prompts["scene_system"]), Message(role=Role.USER, text=asked)


def profile(slot: Slot, person: Fields) -> str:
    """The person sheet. Name, age and occupation are the slot's, so that no answer can change them."""
    occupation = with_article(slot.occupation) if slot.language == "en" else slot.occupation
    introduction = _prompts(slot.language)["introduction"].format(
        name=slot.name, age=slot.age, occupation=occupation
    )
    return "\n\n".join((introduction, person["character"], person["days"], person["speech"]))


def scene(language: str, fields: Fields) -> str:
    """The scene as one text; the wish, what is hidden and the user's own words stay out."""
    space = "" if language == "zh" else " "
    paragraphs = (
        fields["cause"],
        space.join(fields["timeline"]),
        space.join(fields["people"]),
        space.join((*fields["tried"], fields["now"])),
        fields["reaction"],
    )
    return "\n\n".join(paragraphs)


def persona(slot: Slot, person: Fields, fields: Fields) -> Persona:
    """The finished persona."""
    return Persona(
        id=slot.id,
        name=slot.name,
        profile=profile(slot, person),
        scene=scene(slot.language, fields),
        temperament=slot.temperament,
        traits=slot.traits,
        hidden_intent=slot.intent,
        want=fields["want"],
        hides=fields["hides"],
        language=slot.language,
        topic=fields["topic"],
        situation_id=slot.id,
        opening=fields["opening"],
        facts=tuple(fields["facts"]),
    )


def digest() -> str:
    """Names the wording of prompts and seeds."""
    names = [*(f"prompts_{language}.yaml" for language in LANGUAGES), "seeds.yaml"]
    return hashlib.sha256(b"\0".join(_read(name) for name in names)).hexdigest()[:12]


@cache
def _prompts(language: str) -> dict[str, Any]:
    return yaml.safe_load(_read(f"prompts_{language}.yaml"))


def _read(name: str) -> bytes:
    return (files("rlver_dist.persona_synthesis") / name).read_bytes()
