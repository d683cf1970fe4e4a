"""What an appraiser is, what its appraisal may depend on, and how the reward service asks one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, Message, Role
from rlver_dist.simulator.emotion import clip_change
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.protocol import UserRequest
from rlver_dist.simulator.reading import hear

MAX_READ_CHARS = 8000
"""Characters of a text that rules read. What is behind them counts for nothing, so that the time of an
appraisal has a bound however long a reply is."""


@dataclass(kw_only=True, slots=True, frozen=True)
class AppraisalContext:
    """Everything that an appraisal may depend on.

    Attributes:
        persona: who hears the reply.
        messages: the dialogue so far, opening first; the last one is the policy's reply.
        acceptance: difficulty, 0 to 1: share of the reply's positive merit that counts.
        max_change: the change is clipped to plus or minus so many points.
        truncated: the reply was cut at the token limit.
    """

    persona: Persona
    messages: tuple[Message, ...]
    acceptance: float
    max_change: float
    truncated: bool

    @property
    def written(self) -> str:
        """The policy's reply as it was written: what its form is measured on. Its words are read in
        `heard`."""
        return self.messages[-1].text[:MAX_READ_CHARS]

    def heard(self) -> AppraisalContext:
        """The same context with each message as a listener hears it (`hear`)."""
        messages = tuple(
            replace(message, text=hear(message.text[:MAX_READ_CHARS], own=message.role is Role.USER).text)
            for message in self.messages
        )
        return replace(self, messages=messages)


class Appraiser(Protocol):
    """Must be deterministic: equal contexts give equal appraisals, in any order and in any process."""

    def appraise(self, context: AppraisalContext) -> Appraisal:
        """Appraise the last message of `context`."""
        ...


def appraise_request(appraiser: Appraiser, request: UserRequest, rules: DifficultyRules) -> Appraisal:
    """The appraisal of the last message of `request` under `rules`, with its change clipped to them."""
    context = AppraisalContext(
        persona=request.persona,
        messages=request.messages,
        acceptance=rules.acceptance,
        max_change=rules.emotion.max_change,
        truncated=request.truncated,
    )
    appraisal = appraiser.appraise(context)
    return replace(appraisal, change=clip_change(appraisal.change, rules.emotion.max_change))
