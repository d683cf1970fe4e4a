"""What the users' backend can speak for and needs; without torch, so that a run can ask before anything is
loaded."""

from __future__ import annotations

from collections.abc import Iterable

from rlver_dist.config.enums import SecondJudge
from rlver_dist.data.persona import Persona
from rlver_dist.errors import DataError

LANGUAGE = "en"
"""The language that the rules know."""
LLM_LANGUAGES = ("en", "zh")
"""Those that the chat model's prompts are written in."""


def check_personas(personas: Iterable[Persona]) -> None:
    """Refuse personas that this backend cannot speak for.

    Raises:
        DataError: names the first such persona, the field and the way out.
    """
    for persona in personas:
        if persona.language != LANGUAGE:
            problem = f"language={persona.language}"
        elif not persona.opening:
            problem = "opening is empty"
        elif not persona.facts:
            problem = "facts is empty"
        else:
            continue
        raise DataError(
            f"persona {persona.id}: {problem}: the simulated users need English personas with an opening and "
            f"facts; use data.train=bank and data.evaluation=bank"
        )


def check_languages(personas: Iterable[Persona]) -> None:
    """Refuse personas whose language the chat models' prompts are not written in.

    Raises:
        DataError: names the first such persona and the way out.
    """
    for persona in personas:
        if persona.language not in LLM_LANGUAGES:
            raise DataError(
                f"persona {persona.id}: language={persona.language}: use personas in "
                f"{' or '.join(LLM_LANGUAGES)}"
            )


def check_second_judge(judge: SecondJudge, personas: Iterable[Persona]) -> None:
    """Refuse evaluation personas whose dialogues the second judge cannot read: its rules, where it has some,
    know one language.

    Raises:
        DataError: names the first such persona and the way out.
    """
    if judge not in (SecondJudge.lexical, SecondJudge.embedded):
        return
    for persona in personas:
        if persona.language != LANGUAGE:
            raise DataError(
                f"persona {persona.id}: language={persona.language}: evaluation.second_judge={judge.value} "
                f"reads English alone; use none or openai"
            )
