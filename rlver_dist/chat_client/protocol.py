"""The interface of a chat model: one request, one answer, whether an engine or an endpoint serves it.

A backend answers under a JSON schema; it neither builds prompts nor reads the answer's fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rlver_dist.dialogue import Message

JsonSchema = dict[str, Any]
"""A JSON schema as `json.dumps` takes it."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatRequest:
    """One call.

    Attributes:
        key: names the call in errors and logs, for example `<dialogue_id>/<turn>/appraise`; equal keys have
            equal content.
        messages: in order, the part that is constant over many calls first.
        schema_name: letters, digits, `_` and `-`.
        schema: JSON schema that the answer must follow.
        max_tokens: most tokens of the answer.
        temperature: 0 for greedy decoding.
        seed: of the sampling; without effect at temperature 0.
        affinity: equal values share a long prefix (the persona's id), so that a backend can send them to the
            same cache.
    """

    key: str
    messages: tuple[Message, ...]
    schema_name: str
    schema: JsonSchema
    max_tokens: int
    temperature: float
    seed: int
    affinity: str


@dataclass(kw_only=True, slots=True, frozen=True)
class ChatAnswer:
    """What came back.

    Attributes:
        text: JSON as the model wrote it, not validated.
        prompt_tokens: tokens of the prompt.
        cached_tokens: those of them that a prefix cache served; 0 where the backend does not say.
        completion_tokens: tokens of the answer.
        seconds: from the call to the answer, retries included.
        retries: tries after the first.
        model: what answered, for example `Qwen/Qwen2.5-14B-Instruct`.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    retries: int
    model: str


class ChatBackend(Protocol):
    """A chat model behind an engine or an endpoint."""

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The model's answer.

        Raises:
            BoundaryError: this call failed for good; other calls are not affected.
            BudgetError: tokens, money or quota are used up; no further call can be made.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Figures since the last call, by plain name; the window starts anew."""
        ...

    async def close(self) -> None:
        """Give back connections and engines; no call follows."""
        ...
