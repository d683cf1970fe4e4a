"""Collecting dialogues: each one is its own coroutine and goes on as soon as its own reply or appraisal is
there.

What generates replies and what answers them come in as functions, so the same loop runs over Ray actors or in
one process. Dialogues that the policy spoils end with their reason; a failed engine or simulator ends its
dialogue as data, not as a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.errors import BoundaryError, BudgetError
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.protocol import UserRequest, UserResponse

T = TypeVar("T")
FinishReason = Literal["stop", "length"]


@dataclass(kw_only=True, slots=True, frozen=True)
class GenerateRequest:
    """One reply to sample.

    Attributes:
        dialogue_id: keeps a dialogue on one engine, for its prefix cache.
        turn_index: 0 for the first reply; with `dialogue_id` the key of the request.
        prompt_ids: `[P]` token ids.
        max_tokens: limit of the reply.
        temperature: of the sampling distribution.
        seed: of this reply's sampling.
    """

    dialogue_id: str
    turn_index: int
    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(kw_only=True, slots=True, frozen=True)
class Generation:
    """One sampled reply.

    Attributes:
        token_ids: `[R]` as sampled, the end token included where one was sampled.
        logprobs: `[R]` in nats, of each sampled id under the sampling distribution.
        finish_reason: "stop" at an end token, "length" at the token limit.
        policy_version: first and last weight version that sampled it.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    policy_version: tuple[int, int]


GenerateFn = Callable[[GenerateRequest], Awaitable[Generation]]
RespondFn = Callable[[UserRequest], Awaitable[UserResponse]]
ProgressFn = Callable[[int, Turn | None], None]
"""Called with the number of turns that are settled now, and the turn where that is a reply; a dialogue that
ends settles the turns that it will not have, so that all of them sum to dialogues times `max_turns`."""


@dataclass(kw_only=True, slots=True, frozen=True)
class DialogueTask:
    """One dialogue to hold; fields as in `Dialogue`."""

    id: str
    group_id: str
    persona: Persona
    seed: int


@dataclass(kw_only=True, slots=True, frozen=True)
class CollectLimits:
    """Limits and sampling of one collection; meanings and units as in `RolloutConfig` and `ModelConfig`.

    Attributes:
        strict_format: a reply that is not well-formed ends the dialogue as `EndReason.MALFORMED`; else the
            user hears what there is of it, silence too, so that saying nothing never saves an emotion from
            falling.
    """

    max_turns: int
    max_reply_tokens: int
    max_context_tokens: int
    end_on_truncation: bool
    strict_format: bool
    temperature: float
    max_concurrent: int
    request_timeout_s: float


async def collect(
    tasks: Sequence[DialogueTask],
    *,
    generate: GenerateFn,
    respond: RespondFn,
    renderer: Renderer,
    limits: CollectLimits,
    on_progress: ProgressFn | None = None,
) -> list[Dialogue]:
    """Hold all dialogues, at most `limits.max_concurrent` at a time; returns them sorted by id.

    A failed or late `generate` or `respond` ends its dialogue as `EndReason.INFRASTRUCTURE` with a one-line
    error. Cancellation propagates and cancels every dialogue in flight.

    Raises:
        BudgetError: no user can answer any more; every dialogue in flight is cancelled.
    """
    slots = asyncio.Semaphore(limits.max_concurrent)
    report: ProgressFn = on_progress or (lambda settled, turn: None)

    async def run_one(task: DialogueTask) -> Dialogue:
        async with slots:
            dialogue = await _Conversation(
                task, generate, respond, renderer, limits, lambda turn: report(1, turn)
            ).run()
        report(limits.max_turns - len(dialogue.turns), None)
        return dialogue

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(run_one(task)) for task in tasks]
    except BaseExceptionGroup as failed:
        for error in failed.exceptions:
            if isinstance(error, BudgetError):
                raise error from None
        raise
    return sorted((task.result() for task in running), key=lambda dialogue: dialogue.id)


class _Conversation:
    """One dialogue between the policy and its simulated user."""

    def __init__(
        self,
        task: DialogueTask,
        generate: GenerateFn,
        respond: RespondFn,
        renderer: Renderer,
        limits: CollectLimits,
        on_reply: Callable[[Turn], None],
    ) -> None:
        self._task = task
        self._generate = generate
        self._respond = respond
        self._renderer = renderer
        self._limits = limits
        self._on_reply = on_reply
        self._dialogue = Dialogue(
            id=task.id,
            persona_id=task.persona.id,
            group_id=task.group_id,
            seed=task.seed,
            opening="",
            start_emotion=0.0,
            turns=[],
            end_reason=EndReason.INFRASTRUCTURE,
            final_emotion=0.0,
        )

    async def run(self) -> Dialogue:
        dialogue = self._dialogue
        try:
            dialogue.end_reason = await self._talk()
        except BoundaryError as error:
            dialogue.end_reason = EndReason.INFRASTRUCTURE
            dialogue.error = " ".join(str(error).split())
        return dialogue

    async def _talk(self) -> EndReason:
        dialogue, limits = self._dialogue, self._limits
        opening = await self._ask_user(turn_index=-1, truncated=False)
        if opening.message is None:
            raise BoundaryError("user simulator: gave no opening")
        dialogue.opening = opening.message
        dialogue.start_emotion = dialogue.final_emotion = opening.emotion
        prompt_ids = self._renderer.opening_prompt(opening.message)
        for index in range(limits.max_turns):
            if len(prompt_ids) + limits.max_reply_tokens > limits.max_context_tokens:
                return EndReason.CONTEXT_OVERFLOW
            turn = await self._reply(index, prompt_ids)
            if limits.strict_format and not turn.well_formed:
                return EndReason.MALFORMED
            if turn.truncated and limits.end_on_truncation:
                return EndReason.OVER_LONG
            end_reason = await self._appraise(turn)
            if end_reason is not None:
                return end_reason
            assert turn.user_message is not None
            prompt_ids = self._renderer.next_prompt(prompt_ids, turn.reply_ids, turn.reply, turn.user_message)
        return EndReason.MAX_TURNS

    async def _reply(self, index: int, prompt_ids: list[int]) -> Turn:
        """Sample one reply and record it, not appraised yet."""
        dialogue, limits = self._dialogue, self._limits
        request = GenerateRequest(
            dialogue_id=dialogue.id,
            turn_index=index,
            prompt_ids=prompt_ids,
            max_tokens=limits.max_reply_tokens,
            temperature=limits.temperature,
            seed=derive_seed(dialogue.seed, index),
        )
        generation = await self._within_time("rollout engine", self._generate(request))
        parsed = self._renderer.parse_reply(generation.token_ids)
        turn = Turn(
            index=index,
            prompt_ids=prompt_ids,
            reply_ids=generation.token_ids,
            logprobs=generation.logprobs,
            reply=parsed.reply,
            thinking=parsed.thinking,
            well_formed=parsed.well_formed,
            thinking_tokens=parsed.thinking_tokens,
            truncated=generation.finish_reason == "length",
            emotion_before=dialogue.final_emotion,
            emotion_after=dialogue.final_emotion,
            appraisal=None,
            user_message=None,
            policy_version=generation.policy_version,
        )
        dialogue.turns.append(turn)
        self._on_reply(turn)
        return turn

    async def _appraise(self, turn: Turn) -> EndReason | None:
        """Add the user's appraisal and answer to the turn; returns why the user ends the talk, or None."""
        response = await self._ask_user(turn_index=turn.index, truncated=turn.truncated)
        if response.message is None and response.end_reason is None:
            raise BoundaryError("user simulator: gave neither a message nor an end reason")
        turn.appraisal = response.appraisal
        turn.emotion_after = self._dialogue.final_emotion = response.emotion
        turn.user_message = response.message
        return response.end_reason

    async def _ask_user(self, *, turn_index: int, truncated: bool) -> UserResponse:
        dialogue = self._dialogue
        request = UserRequest(
            dialogue_id=dialogue.id,
            turn_index=turn_index,
            persona=self._task.persona,
            messages=() if turn_index < 0 else tuple(dialogue.messages()),
            emotion=dialogue.final_emotion,
            seed=dialogue.seed,
            max_turns=self._limits.max_turns,
            truncated=truncated,
        )
        return await self._within_time("user simulator", self._respond(request))

    async def _within_time(self, what: str, call: Awaitable[T]) -> T:
        """Await an outside call; its failure becomes a `BoundaryError` that names it. Cancellation and
        `BudgetError` pass."""
        timeout_s = self._limits.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as clock:
                return await call
        except BudgetError:
            raise
        except Exception as error:
            if clock.expired():
                raise BoundaryError(
                    f"{what}: no answer within {timeout_s:g} s (rollout.request_timeout_s)"
                ) from error
            raise BoundaryError(f"{what}: {type(error).__name__}: {error}") from error
