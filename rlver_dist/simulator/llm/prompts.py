"""The prompts of the LLM users: a system message that is constant for a persona, then the talk as data, then
the task.

Everything constant comes first, and the talk only grows at its end, so that an engine's prefix cache serves
most of each prompt. The words are in `prompts_<language>.yaml`; what enters them from outside is made
harmless by `fence.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, Message, Role
from rlver_dist.errors import DataError
from rlver_dist.simulator.emotion import state_of
from rlver_dist.simulator.llm.fence import CHARS_PER_BYTE, Fenced, fence, json_line, tidy
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.protocol import UserRequest
from rlver_dist.simulator.suitability import LLM_LANGUAGES

ORDINARY_ACCEPTANCE = 0.8
OPEN_EXPRESSIVENESS = 0.7
"""A prompt describes a user in words, not in numbers: from these values on the wording is that of a user who
lets merit count, and of one who shows feelings."""
EARLIER_REPLY_DIVISOR = 4
"""Earlier replies show so much less than the newest one, which alone is appraised. A constant, so that their
lines stay equal from turn to turn and the engine's prefix cache still serves them."""
MAX_OWN_BYTES = 2000
"""UTF-8 bytes of one of the user's own messages in a prompt."""
MAX_NOTE_BYTES = 1000
"""UTF-8 bytes of one note of the appraisal in the prompt of the reply."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{name}` replaced by its value, in one pass: what a value holds is never looked
    at.

    Raises:
        KeyError: a placeholder has no value.
    """
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


@cache
def material(language: str) -> dict[str, Any]:
    """The prompts of one language.

    Raises:
        DataError: there are none.
    """
    return yaml.safe_load(_source(language))


@cache
def prompt_version(language: str) -> str:
    """Names the prompts in records, for example `en-1a2b3c4d`: language and the start of their text's
    SHA-256."""
    return f"{language}-{hashlib.sha256(_source(language)).hexdigest()[:8]}"


def _source(language: str) -> bytes:
    if language not in LLM_LANGUAGES:
        raise DataError(
            f"persona language={language}: LLM users have prompts in {', '.join(LLM_LANGUAGES)}; use "
            f"personas in one of these"
        )
    return resources.files("rlver_dist.simulator.llm").joinpath(f"prompts_{language}.yaml").read_bytes()


@dataclass(kw_only=True, slots=True, frozen=True)
class UserPrompts:
    """Builds the messages of each call.

    Attributes:
        rules: of difficulty; `acceptance`, `expressiveness` and `hides_aim` choose between two wordings each.
        max_reply_bytes: UTF-8 bytes of the newest reply that a prompt shows; earlier ones show a quarter of
            that.
    """

    rules: DifficultyRules
    max_reply_bytes: int

    def opening(self, persona: Persona) -> tuple[Message, ...]:
        """For the user's first message."""
        return self._messages(persona, material(persona.language)["tasks"]["opening"])

    def appraisal(self, request: UserRequest) -> tuple[Message, ...]:
        """For the appraisal of the last reply, at the emotion before it."""
        return self._task(request, "appraisal", request.emotion)

    def reply(self, request: UserRequest, appraisal: Appraisal, emotion: float) -> tuple[Message, ...]:
        """For the user's next message, at the `emotion` after the appraisal; the user knows its state, not
        its number."""
        # The notes are a model's answer to a prompt that held the policy's text, so they are fenced as well.
        texts = {"fit": appraisal.fit, "activity": appraisal.activity, "feeling": appraisal.feeling}
        notes = {name: fence(text, max_bytes=MAX_NOTE_BYTES, own=True).text for name, text in texts.items()}
        return self._task(request, "reply", emotion, notes=json_line(**notes))

    def turn(self, request: UserRequest) -> tuple[Message, ...]:
        """For both in one call, at the emotion before the reply."""
        return self._task(request, "turn", request.emotion)

    def fenced_reply(self, request: UserRequest) -> Fenced:
        """The newest reply as prompts show it."""
        return self._fenced(request.messages[-1].text, newest=True)

    def _fenced(self, reply: str, *, newest: bool) -> Fenced:
        """A reply as the talk shows it; both ways it reads the same, up to the cut."""
        # Both read the same characters: what follows the cut decides whether a tag before it is closed.
        limit = self.max_reply_bytes if newest else self.max_reply_bytes // EARLIER_REPLY_DIVISOR
        return fence(reply, max_bytes=limit, max_chars=CHARS_PER_BYTE * self.max_reply_bytes)

    def _task(self, request: UserRequest, task: str, emotion: float, **values: str) -> tuple[Message, ...]:
        words = material(request.persona.language)
        state = words["states"][state_of(emotion).value]
        asked = fill(
            words["tasks"][task],
            {"emotion": f"{emotion:g}", "state": state, "number": str(len(request.messages)), **values},
        )
        return self._messages(request.persona, f"{self._talk(request)}\n\n{asked}")

    def _messages(self, persona: Persona, asked: str) -> tuple[Message, ...]:
        return (Message(role=Role.SYSTEM, text=self._system(persona)), Message(role=Role.USER, text=asked))

    def _talk(self, request: UserRequest) -> str:
        """The talk so far, one JSON object a line."""
        lines = []
        for number, message in enumerate(request.messages, start=1):
            own = message.role is Role.USER
            newest = number == len(request.messages)
            if own:
                fenced = fence(message.text, max_bytes=MAX_OWN_BYTES, own=True)
            else:
                fenced = self._fenced(message.text, newest=newest)
            fields: dict[str, object] = {"line": number, "by": "you" if own else "other", "text": fenced.text}
            if fenced.cut:
                fields["left_out_bytes"] = fenced.cut
            if newest and request.truncated:
                fields["broken_off"] = True
            # One JSON object a line: a reply cannot end its string or its line, so it cannot look like a line
            # of the user or like the task behind the talk.
            lines.append(json_line(**fields))
        return "\n".join(lines)

    def _system(self, persona: Persona) -> str:
        words = material(persona.language)
        acceptance = "ordinary" if self.rules.acceptance >= ORDINARY_ACCEPTANCE else "strict"
        disclosure = "hidden" if self.rules.hides_aim else "hints"
        expressiveness = "open" if self.rules.expressiveness >= OPEN_EXPRESSIVENESS else "reserved"
        wording = {
            "acceptance": words["acceptance"][acceptance],
            "disclosure": words["disclosure"][disclosure],
            "expressiveness": words["expressiveness"][expressiveness],
        }
        told = {
            "profile": persona.profile,
            "name": persona.name,
            "traits": words["separator"].join(persona.traits),
            "scene": persona.scene,
            "want": persona.want,
            "hides": persona.hides,
            "facts": "\n".join(f"- {fact}" for fact in persona.facts),
        }
        # An operator's file may still hold text from elsewhere, which must not open a chat template's tag.
        values = {name: tidy(text) for name, text in told.items()}
        values["temperament"] = words["temperaments"][persona.temperament.value]
        values["intent"] = words["intents"][persona.hidden_intent.value]
        sections = [(heading, fill(text, values).strip()) for heading, text in words["persona"]]
        # A heading without a text would invite the model to invent one.
        filled = [f"{heading}\n{text}" for heading, text in sections if text]
        return "\n\n".join([fill(words["system"], wording).strip(), *filled])
