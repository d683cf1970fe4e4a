"""What every simulated user answers to, whatever drives it (rules on embeddings, or a chat model).

A simulated user is a pure function of its request (persona, dialogue so far, emotion, seed, limits): it holds
no session, so that any replica can answer and a retry returns the same value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, EndReason, Message


@dataclass(kw_only=True, slots=True, frozen=True)
class UserRequest:
    """One question to the simulated user: how do you take the last reply, and what do you say?

    Attributes:
        dialogue_id: names the dialogue in errors and in a chat model's calls; no answer depends on it.
        turn_index: index of the reply that is appraised; -1 asks for the opening.
        persona: who the user is.
        messages: the dialogue so far, opening first; the last one is the policy's reply (empty for the
            opening).
        emotion: emotion (0 to 100) before the reply.
        seed: the dialogue's seed.
        max_turns: replies that a dialogue may have; the reply with index `max_turns - 1` is the last one.
        truncated: the last reply was cut at the token limit.
    """

    dialogue_id: str
    turn_index: int
    persona: Persona
    messages: tuple[Message, ...]
    emotion: float
    seed: int
    max_turns: int
    truncated: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class UserResponse:
    """The user's answer.

    Attributes:
        appraisal: None only for the opening.
        emotion: emotion after the reply (the start emotion for the opening).
        message: what the user says next; None where the dialogue has ended.
        end_reason: None while the dialogue goes on.
    """

    appraisal: Appraisal | None
    emotion: float
    message: str | None
    end_reason: EndReason | None


class UserSimulator(Protocol):
    """A backend that computes: called from one thread, may be slow, must be deterministic."""

    def respond(self, request: UserRequest) -> UserResponse:
        """Open the dialogue (`turn_index` -1) or appraise the last reply and answer it."""
        ...


class AsyncUserSimulator(Protocol):
    """A backend that waits for others: any number of calls at a time, in the event loop's thread, and no
    state of a dialogue."""

    async def respond(self, request: UserRequest) -> UserResponse:
        """Open the dialogue (`turn_index` -1) or appraise the last reply and answer it."""
        ...


class Judge(Protocol):
    """Appraises and says nothing; must be as deterministic as what it asks: equal requests give equal
    appraisals."""

    async def appraise(self, request: UserRequest) -> Appraisal:
        """Appraise the last message of `request`; the change is in points, clipped to the judge's rules."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, by plain name."""
        ...
