"""Simulated users spoken for by a chat model (SAGE, arXiv:2505.02847, section 2.3): appraise the reply, move
the emotion, answer.

The model gives reasons, one whole number and words, each in its own field of a schema; all arithmetic, and
every end but a goodbye, is the rules' (`emotion.py`). What judged is recorded with each appraisal.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace

from rlver_dist.chat_client.protocol import ChatBackend, ChatRequest, JsonSchema
from rlver_dist.config.enums import LlmCalls
from rlver_dist.config.simulator import LlmUserConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, EndReason, Message, Role
from rlver_dist.errors import BoundaryError
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator import narration
from rlver_dist.simulator.emotion import clip_change, end_reason, move
from rlver_dist.simulator.llm.fence import Fenced
from rlver_dist.simulator.llm.prompts import UserPrompts, prompt_version
from rlver_dist.simulator.llm.schema import (
    Fields,
    SchemaError,
    appraisal_schema,
    opening_schema,
    parse_answer,
    reply_schema,
    turn_schema,
)
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.protocol import Judge, UserRequest, UserResponse

RETRY_TEMPERATURE = 0.7
"""Least temperature after an answer that broke its schema: at 0 the same prompt breaks it again, whatever the
seed."""


@dataclass(kw_only=True, slots=True, frozen=True)
class _Step:
    """One kind of call.

    Attributes:
        name: `appraise`, `reply`, `turn` or `open`; ends the call's key and names its schema.
        schema: what the answer must follow.
        max_tokens: of the answer.
    """

    name: str
    schema: JsonSchema
    max_tokens: int


@dataclass(kw_only=True, slots=True, frozen=True)
class _Answered:
    """The checked fields of an answer, and what gave it (JSON)."""

    fields: Fields
    source: str


class LlmSimulator:
    """An `AsyncUserSimulator`: holds the rules, the settings and the backend, and no dialogue."""

    def __init__(
        self,
        *,
        rules: DifficultyRules,
        backend: ChatBackend,
        settings: LlmUserConfig,
        judge: Judge | None = None,
    ) -> None:
        """
        Args:
            rules: of emotion and difficulty.
            backend: speaks for the user.
            settings: calls a turn, sampling, and limits of prompts and answers.
            judge: appraises in place of the user's own model, in a call apart from the reply even where
                `settings.calls` is `one`; None leaves it to the user's model.
        """
        self.rules = rules
        self._backend = backend
        self._settings = settings
        self._judge = judge
        self._prompts = UserPrompts(rules=rules, max_reply_bytes=settings.max_reply_bytes)
        self._counts: Counter[str] = Counter()

    async def respond(self, request: UserRequest) -> UserResponse:
        """Open the dialogue (`turn_index` -1), or appraise the last reply, move the emotion, and answer or
        end.

        Raises:
            BoundaryError: the backend failed for good, or its answers kept breaking their schema.
            BudgetError: the backend may not be asked any more.
            DataError: there are no prompts in the persona's language.
            ValueError: the last message is not the policy's.
        """
        if request.turn_index < 0:
            opening = request.persona.opening or await self._open(request)
            return UserResponse(
                appraisal=None, emotion=self.rules.emotion.start, message=opening, end_reason=None
            )
        if not request.messages or request.messages[-1].role is not Role.ASSISTANT:
            raise ValueError(
                f"dialogue {request.dialogue_id}, turn {request.turn_index}: the last message must be the "
                f"policy's reply"
            )
        reply: Fields | None = None
        if (
            self._judge is None
            and self._settings.calls is LlmCalls.one
            # A reply without a word is appraised without a call.
            and (fenced := self._prompts.fenced_reply(request)).text
        ):
            appraisal, reply = await self._turn(request, fenced)
        else:
            appraisal = await (self._judge or self).appraise(request)
        rules = self.rules.emotion
        # Again, since a judge that is given from outside need not know these rules.
        appraisal = replace(appraisal, change=clip_change(appraisal.change, rules.max_change))
        emotion = move(request.emotion, appraisal.change, rules)
        ending = end_reason(
            emotion, rules=rules, num_replies=request.turn_index + 1, max_turns=request.max_turns
        )
        # A user who has left says nothing, so the call for a reply is saved.
        if ending is None and reply is None:
            reply = await self._reply(request, appraisal, emotion)
        if ending is None and reply is not None and reply["goodbye"]:
            ending = EndReason.GOODBYE
        message = reply["message"] if ending is None and reply is not None else None
        return UserResponse(appraisal=appraisal, emotion=emotion, message=message, end_reason=ending)

    async def appraise(self, request: UserRequest) -> Appraisal:
        """How the user takes the last reply; the change is the model's, clipped to the rules. Errors as in
        `respond`.

        A reply in which nothing is left to read gets the largest negative change, and no call.
        """
        fenced = self._prompts.fenced_reply(request)
        # Asked about nothing, a model would make something up.
        if not fenced.text:
            return narration.silence(request.persona, self.rules.emotion.max_change)
        tokens = self._settings.max_appraisal_tokens
        schema = appraisal_schema(language=request.persona.language, max_tokens=tokens)
        step = _Step(name="appraise", schema=schema, max_tokens=tokens)
        answered = await self._ask(request, step, self._prompts.appraisal(request))
        return self._appraisal(fenced, answered.fields, answered.source)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: answers that broke their schema, calls that never kept it, and replies
        with tricks in them; those of the judge that appraises in the user's place are added."""
        # Every name, also those that did not happen: a metric that comes and goes leaves holes in a curve.
        names = (
            "schema_retries",
            "schema_failures",
            "replies_with_markup",
            "replies_with_hidden",
            "replies_with_thought",
            "replies_cut",
        )
        self._counts.update(self._judge.metrics() if self._judge else {})
        values = {name: float(self._counts[name]) for name in names}
        self._counts.clear()
        return values

    async def _turn(self, request: UserRequest, fenced: Fenced) -> tuple[Appraisal, Fields]:
        """Appraisal and reply in one call."""
        note_tokens = self._settings.max_appraisal_tokens
        message_tokens = self._settings.max_message_tokens
        schema = turn_schema(
            language=request.persona.language,
            max_appraisal_tokens=note_tokens,
            max_message_tokens=message_tokens,
        )
        step = _Step(name="turn", schema=schema, max_tokens=note_tokens + message_tokens)
        answered = await self._ask(request, step, self._prompts.turn(request))
        appraisal = self._appraisal(fenced, answered.fields["appraisal"], answered.source)
        return appraisal, answered.fields["reply"]

    async def _reply(self, request: UserRequest, appraisal: Appraisal, emotion: float) -> Fields:
        tokens = self._settings.max_message_tokens
        schema = reply_schema(language=request.persona.language, max_tokens=tokens)
        step = _Step(name="reply", schema=schema, max_tokens=tokens)
        answered = await self._ask(request, step, self._prompts.reply(request, appraisal, emotion))
        return answered.fields

    async def _open(self, request: UserRequest) -> str:
        tokens = self._settings.max_message_tokens
        schema = opening_schema(language=request.persona.language, max_tokens=tokens)
        step = _Step(name="open", schema=schema, max_tokens=tokens)
        answered = await self._ask(request, step, self._prompts.opening(request.persona))
        return answered.fields["message"]

    def _appraisal(self, fenced: Fenced, fields: Fields, source: str) -> Appraisal:
        tricks = {
            "markup": fenced.markup,
            "hidden": fenced.hidden,
            "thought": fenced.thought,
            "cut": fenced.cut,
        }
        for name, amount in tricks.items():
            self._counts["replies_cut" if name == "cut" else f"replies_with_{name}"] += amount > 0
        change = clip_change(fields["change"], self.rules.emotion.max_change)
        return Appraisal(
            content=fields["content"],
            fit=fields["fit"],
            activity=fields["activity"],
            feeling=fields["feeling"],
            # The rollout has already removed the policy's own thinking, so thinking tags in a reply are a
            # trick to hide a part of it. Such a reply may cost emotion and never earns any.
            change=min(change, 0.0) if fenced.thought else change,
            features={f"fence_{name}": float(amount) for name, amount in tricks.items()},
            source=source,
        )

    async def _ask(self, request: UserRequest, step: _Step, messages: tuple[Message, ...]) -> _Answered:
        """The checked answer; one that breaks its schema is asked for again with another seed,
        `schema_retries` times."""
        # Errors name the call by this, whatever its attempt was.
        key = f"{request.dialogue_id}/{request.turn_index}/{step.name}"
        problem: SchemaError | None = None
        for attempt in range(self._settings.schema_retries + 1):
            chat = self._chat_request(key, request, step, messages, attempt)
            answer = await self._backend.ask(chat)
            try:
                fields = parse_answer(answer.text, step.schema)
            except SchemaError as error:
                problem = error
                self._counts["schema_retries"] += attempt < self._settings.schema_retries
                continue
            return _Answered(fields=fields, source=self._source(answer.model, chat, request.persona))
        self._counts["schema_failures"] += 1
        raise BoundaryError(
            f"{key}: {self._settings.schema_retries + 1} answers broke their schema, the last: {problem}"
        ) from problem

    def _chat_request(
        self, key: str, request: UserRequest, step: _Step, messages: tuple[Message, ...], attempt: int
    ) -> ChatRequest:
        temperature = self._settings.temperature
        seed = self._seed(request, attempt)
        return ChatRequest(
            # Two judges, or two attempts, differ in their seeds, and so do their keys.
            key=f"{key}/{seed}",
            messages=messages,
            schema_name=step.name,
            schema=step.schema,
            max_tokens=step.max_tokens,
            temperature=temperature if attempt == 0 else max(temperature, RETRY_TEMPERATURE),
            seed=seed,
            # All calls of a persona share its system message, the longest part of each prompt.
            affinity=request.persona.id,
        )

    def _seed(self, request: UserRequest, attempt: int) -> int:
        """31 bits from the settings' seed, the dialogue's seed, the turn and the attempt.

        An opening takes the persona in place of the dialogue: all dialogues of a group have to begin with the
        same message, since GRPO compares them with each other.
        """
        asked: tuple[object, object]
        if request.turn_index >= 0:
            asked = (request.seed, request.turn_index)
        else:
            asked = (request.persona.id, "open")
        return derive_seed(self._settings.seed, *asked, attempt, bits=31)

    def _source(self, model: str, chat: ChatRequest, persona: Persona) -> str:
        """What judged, as JSON: enough to ask the same question again."""
        return json.dumps(
            {
                "model": model,
                "calls": self._settings.calls.value,
                "temperature": chat.temperature,
                "seed": chat.seed,
                "prompts": prompt_version(persona.language),
            }
        )
