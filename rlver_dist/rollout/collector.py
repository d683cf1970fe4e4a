"""Collecting dialogues: each one is its own coroutine and goes on as soon as its own reply or appraisal is
there.

What samples replies and what answers them are passed in as functions, so the same loop runs over Ray actors
or in one process. A reply that ends its dialogue gives it an `EndReason`; a failed engine or simulator ends
the dialogue as `EndReason.INFRASTRUCTURE` and raises nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue, EndReason, Message, Role, Turn
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
"""Called with a number of turns to count as done: when a reply was sampled 1 and the turn, not appraised yet;
when a dialogue ended the number of turns that it will not have, and None. Over a collection the numbers sum
to dialogues times `max_turns`."""


@dataclass(kw_only=True, slots=True, frozen=True)
class DialogueTask:
    """A dialogue to run.

    Attributes:
        id: unique within a run.
        group_id: shared by the dialogues that are compared with each other.
        persona: who the user is.
        seed: seeds the user and, per turn, the sampling.
    """

    id: str
    group_id: str
    persona: Persona
    seed: int


@dataclass(kw_only=True, slots=True, frozen=True)
class CollectLimits:
    """Limits and sampling of one collection.

    Attributes:
        max_turns: replies of a dialogue.
        max_reply_tokens: token limit of a reply, its thinking included.
        max_context_tokens: limit of a prompt and a full reply together.
        end_on_truncation: a reply that hits its token limit ends the dialogue as `EndReason.OVER_LONG`; else
            the user hears what there is of it.
        strict_format: a reply that is not well-formed ends the dialogue as `EndReason.MALFORMED`; else the
            user hears what there is of it, silence too. A dialogue that ended at silence would keep its
            emotion, so that saying nothing would pay.
        temperature: of the sampling distribution.
        max_concurrent: dialogues at a time.
        request_timeout_s: longest wait for one reply or one answer of the user, seconds.
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
    """Run all dialogues, at most `limits.max_concurrent` at a time.

    Cancellation propagates and cancels every dialogue in flight.

    Args:
        tasks: the dialogues to run.
        generate: samples one reply.
        respond: asks the user.
        renderer: of the policy's prompts.
        limits: the collection's.
        on_progress: see `ProgressFn`.

    Returns:
        Every dialogue, sorted by id. Where `generate` or `respond` failed or was late it ends as
        `EndReason.INFRASTRUCTURE`, with the turns until then and a one-line error.

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
        # The user can mend a used-up budget, so that its error has to leave the group for its one line to be
        # printed. Anything else is a defect and keeps the group with its tracebacks.
        for error in failed.exceptions:
            if isinstance(error, BudgetError):
                raise error from None
        raise
    # By id and not by when they ended, which depends on the machine.
    return sorted((task.result() for task in running), key=lambda dialogue: dialogue.id)


class _Conversation:
    """One dialogue while it runs: what has been said so far. `run` makes the `Dialogue` of it."""

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
        self._messages: list[Message] = []
        self._turns: list[Turn] = []
        self._emotions: list[float] = []
        """At the opening, then after each appraisal."""

    async def run(self) -> Dialogue:
        error = None
        try:
            end_reason = await self._talk()
        except BoundaryError as failure:
            # Failures of outside calls alone. A defect of ours ends the collection with its traceback.
            end_reason = EndReason.INFRASTRUCTURE
            # One line, as the ledger and the console show it.
            error = " ".join(str(failure).split())
        return Dialogue(
            id=self._task.id,
            persona_id=self._task.persona.id,
            group_id=self._task.group_id,
            seed=self._task.seed,
            opening=self._messages[0].text if self._messages else "",
            start_emotion=self._emotions[0] if self._emotions else 0.0,
            turns=self._turns,
            end_reason=end_reason,
            final_emotion=self._emotions[-1] if self._emotions else 0.0,
            error=error,
        )

    async def _talk(self) -> EndReason:
        limits = self._limits
        opening = await self._ask_user(turn_index=-1, truncated=False)
        if opening.message is None:
            raise BoundaryError("user simulator: gave no opening")
        self._messages.append(Message(role=Role.USER, text=opening.message))
        self._emotions.append(opening.emotion)
        prompt_ids = self._renderer.opening_prompt(opening.message)
        for index in range(limits.max_turns):
            # The reply's limit counts in full: `truncated` always means that limit, never the context's end.
            if len(prompt_ids) + limits.max_reply_tokens > limits.max_context_tokens:
                return EndReason.CONTEXT_OVERFLOW
            turn = await self._reply(index, prompt_ids)
            # Both are checked before the user is asked: a reply that ends the dialogue is not appraised.
            if limits.strict_format and not turn.well_formed:
                return EndReason.MALFORMED
            if turn.truncated and limits.end_on_truncation:
                return EndReason.OVER_LONG
            response = await self._appraise(turn)
            if response.end_reason is not None:
                return response.end_reason
            assert response.message is not None
            prompt_ids = self._renderer.next_prompt(prompt_ids, turn.reply_ids, turn.reply, response.message)
        # A user knows the limit too and ends its last answer with it; this one did not.
        return EndReason.MAX_TURNS

    async def _reply(self, index: int, prompt_ids: list[int]) -> Turn:
        """Sample one reply and record it, not appraised yet."""
        limits = self._limits
        request = GenerateRequest(
            dialogue_id=self._task.id,
            turn_index=index,
            prompt_ids=prompt_ids,
            max_tokens=limits.max_reply_tokens,
            temperature=limits.temperature,
            # Of dialogue and turn alone, so that a retry on another engine samples the same reply.
            seed=derive_seed(self._task.seed, index),
        )
        generation = await self._within_time("rollout engine", self._generate(request))
        parsed = self._renderer.parse_reply(generation.token_ids)
        emotion = self._emotions[-1]
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
            emotion_before=emotion,
            emotion_after=emotion,
            appraisal=None,
            user_message=None,
            policy_version=generation.policy_version,
        )
        # Recorded at once, so that a reply whose appraisal fails is in the dialogue, without an appraisal.
        self._turns.append(turn)
        self._messages.append(Message(role=Role.ASSISTANT, text=turn.reply))
        self._on_reply(turn)
        return turn

    async def _appraise(self, turn: Turn) -> UserResponse:
        """Ask the user about `turn`, the last one, and record the answer."""
        response = await self._ask_user(turn_index=turn.index, truncated=turn.truncated)
        if response.message is None and response.end_reason is None:
            raise BoundaryError("user simulator: gave neither a message nor an end reason")
        # A copy: whoever was told of the reply still has the turn as it was then.
        self._turns[-1] = replace(
            turn,
            appraisal=response.appraisal,
            emotion_after=response.emotion,
            user_message=response.message,
        )
        self._emotions.append(response.emotion)
        if response.message is not None:
            self._messages.append(Message(role=Role.USER, text=response.message))
        return response

    async def _ask_user(self, *, turn_index: int, truncated: bool) -> UserResponse:
        request = UserRequest(
            dialogue_id=self._task.id,
            turn_index=turn_index,
            persona=self._task.persona,
            messages=tuple(self._messages),
            # The user itself says at the opening where its emotion starts.
            emotion=self._emotions[-1] if self._emotions else 0.0,
            seed=self._task.seed,
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
            # It stops the whole collection, since every other dialogue would meet it too.
            raise
        except Exception as error:
            # A `TimeoutError` may also come from within the call: only our own clock tells which.
            if clock.expired():
                raise BoundaryError(
                    f"{what}: no answer within {timeout_s:g} s (rollout.request_timeout_s)"
                ) from error
            raise BoundaryError(f"{what}: {type(error).__name__}: {error}") from error
