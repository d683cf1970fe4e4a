"""What an appraiser is, and what its appraisal may depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, Message, Role
from rlver_dist.simulator.reading import hear

MAX_READ_CHARS = 8000
"""Characters of a text that rules look at; what is behind them counts for nothing."""


@dataclass(kw_only=True, slots=True, frozen=True)
class AppraisalContext:
    """Everything that an appraisal may depend on.

    Attributes:
        persona: who hears the reply.
        messages: the dialogue so far, opening first; the last one is the policy's reply.
        emotion: emotion (0 to 100) before the reply.
        acceptance: difficulty, 0 to 1: share of the reply's positive merit that counts.
        max_change: the change is clipped to plus or minus so many points.
        truncated: the reply was cut at the token limit.
    """

    persona: Persona
    messages: tuple[Message, ...]
    emotion: float
    acceptance: float
    max_change: float
    truncated: bool

    @property
    def written(self) -> str:
        """The policy's reply as it was written: what its form is measured on. Its words are read in
        `heard`."""
        return self.messages[-1].text[:MAX_READ_CHARS]

    def heard(self) -> AppraisalContext:
        """The same with each message as a listener has it (`hear`)."""
        texts = [
            hear(message.text[:MAX_READ_CHARS], own=message.role is Role.USER).text
            for message in self.messages
        ]
        return replace(
            self,
            messages=tuple(
                replace(message, text=text) for message, text in zip(self.messages, texts, strict=True)
            ),
        )


class Appraiser(Protocol):
    """Must be deterministic: equal contexts give equal appraisals, in any order and in any process."""

    def appraise(self, context: AppraisalContext) -> Appraisal:
        """Appraise the last message of `context`."""
        ...
