"""The dialogue loop: order of events, ends, and failures as data. Engine and user are small functions over
real dialogue types."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.dialogue import Dialogue, EndReason, Role, Turn
from rlver_dist.errors import BudgetError
from rlver_dist.experience.samples import to_samples
from rlver_dist.rollout.collector import (
    CollectLimits,
    DialogueTask,
    GenerateRequest,
    Generation,
    collect,
)
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from tests.unit import builders

LIMITS = builders.limits()


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(SMOLLM2))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizer(), "Be kind.")


@pytest.fixture(scope="module")
def thinker() -> Renderer:
    return Renderer(tokenizer(), "Think, then be kind.", think=True)


def task(name: str = "d0", seed: int = 1) -> DialogueTask:
    return DialogueTask(id=name, group_id="g", persona=builders.persona(), seed=seed)


def replying(
    renderer: Renderer, text: str = "I see.", finish_reason: str = "stop"
) -> Callable[[GenerateRequest], Awaitable[Generation]]:
    async def generate(request: GenerateRequest) -> Generation:
        ids = tokenizer().encode(text, add_special_tokens=False, split_special_tokens=True)
        ids = [*ids, renderer.end_token_id] if finish_reason == "stop" else ids
        return Generation(
            token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason=finish_reason, policy_version=(4, 5)
        )

    return generate


async def respond(request: UserRequest) -> UserResponse:
    """A user who gains 5 points a reply and leaves after the last one."""
    if request.turn_index < 0:
        return UserResponse(appraisal=None, emotion=30.0, message="My day was bad.", end_reason=None)
    appraisal = builders.appraisal(5.0)
    if request.turn_index == request.max_turns - 1:
        return UserResponse(
            appraisal=appraisal, emotion=request.emotion + 5, message=None, end_reason=EndReason.MAX_TURNS
        )
    return UserResponse(
        appraisal=appraisal,
        emotion=request.emotion + 5,
        message=f"Go on {request.turn_index}.",
        end_reason=None,
    )


def hold(renderer: Renderer, *, generate=None, respond=respond, limits: CollectLimits = LIMITS) -> Dialogue:
    generate = generate or replying(renderer)
    [dialogue] = asyncio.run(
        collect([task()], generate=generate, respond=respond, renderer=renderer, limits=limits)
    )
    return dialogue


def test_whole_dialogue_is_recorded(renderer: Renderer) -> None:
    asked: list[GenerateRequest] = []
    heard: list[UserRequest] = []
    reply = replying(renderer)

    async def generate(request: GenerateRequest) -> Generation:
        asked.append(request)
        return await reply(request)

    async def listen(request: UserRequest) -> UserResponse:
        heard.append(request)
        return await respond(request)

    dialogue = hold(renderer, generate=generate, respond=listen)
    assert dialogue.end_reason is EndReason.MAX_TURNS and dialogue.error is None
    assert (dialogue.opening, dialogue.start_emotion, dialogue.final_emotion) == (
        "My day was bad.",
        30.0,
        45.0,
    )
    assert [(turn.emotion_before, turn.emotion_after) for turn in dialogue.turns] == [
        (30, 35),
        (35, 40),
        (40, 45),
    ]
    assert [turn.user_message for turn in dialogue.turns] == ["Go on 0.", "Go on 1.", None]
    assert dialogue.turns[0].reply == "I see." and dialogue.turns[0].policy_version == (4, 5)
    assert asked[0].prompt_ids == renderer.opening_prompt("My day was bad.")
    for previous, turn in zip(dialogue.turns, dialogue.turns[1:], strict=False):
        assert turn.prompt_ids == renderer.next_prompt(
            previous.prompt_ids, previous.reply_ids, previous.reply, previous.user_message
        )
    assert [request.seed for request in asked] == [derive_seed(1, index) for index in range(3)]
    assert [len(request.messages) for request in heard] == [0, 2, 4, 6]
    assert all(request.messages[-1].role is Role.ASSISTANT for request in heard[1:])


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_reply_is_malformed_and_recorded(renderer: Renderer, text: str) -> None:
    dialogue = hold(renderer, generate=replying(renderer, text))
    assert dialogue.end_reason is EndReason.MALFORMED and dialogue.final_emotion == 30.0
    [turn] = dialogue.turns
    assert (
        turn.reply == ""
        and not turn.well_formed
        and turn.appraisal is None
        and turn.emotion_after == turn.emotion_before == 30.0
    )
    assert turn.reply_ids[-1] == renderer.end_token_id


def test_truncated_reply_ends_or_is_heard_as_it_is(renderer: Renderer) -> None:
    cut = replying(renderer, "It is", finish_reason="length")
    ended = hold(renderer, generate=cut, limits=replace(LIMITS, end_on_truncation=True))
    assert (
        ended.end_reason is EndReason.OVER_LONG and len(ended.turns) == 1 and ended.turns[0].appraisal is None
    )
    heard = hold(renderer, generate=cut)
    assert heard.end_reason is EndReason.MAX_TURNS and all(turn.truncated for turn in heard.turns)


def test_context_overflow_counts_prompt_and_a_full_reply(renderer: Renderer) -> None:
    second = len(hold(renderer).turns[1].prompt_ids)
    fits = hold(renderer, limits=replace(LIMITS, max_context_tokens=second + LIMITS.max_reply_tokens))
    over = hold(renderer, limits=replace(LIMITS, max_context_tokens=second + LIMITS.max_reply_tokens - 1))
    assert fits.end_reason is over.end_reason is EndReason.CONTEXT_OVERFLOW
    assert (len(fits.turns), len(over.turns)) == (2, 1)
    assert over.turns[0].appraisal is not None and over.final_emotion == 35.0


def test_an_opening_that_leaves_no_room_ends_before_the_first_reply(renderer: Renderer) -> None:
    opening = len(renderer.opening_prompt("My day was bad."))
    dialogue = hold(
        renderer, limits=replace(LIMITS, max_context_tokens=opening + LIMITS.max_reply_tokens - 1)
    )
    assert dialogue.end_reason is EndReason.CONTEXT_OVERFLOW and dialogue.turns == []
    assert dialogue.start_emotion == dialogue.final_emotion == 30.0


def test_thinking_turns_share_a_prefix_and_the_user_hears_the_reply_alone(thinker: Renderer) -> None:
    heard: list[UserRequest] = []

    async def listen(request: UserRequest) -> UserResponse:
        heard.append(request)
        return await respond(request)

    dialogue = hold(thinker, generate=replying(thinker, "<think>secret</think>\nI see."), respond=listen)
    assert dialogue.end_reason is EndReason.MAX_TURNS and len(dialogue.turns) == 3
    assert all(
        (turn.thinking, turn.reply, turn.well_formed) == ("secret", "I see.", True) for turn in dialogue.turns
    )
    assert all("secret" not in message.text for request in heard for message in request.messages)
    for previous, turn in zip(dialogue.turns, dialogue.turns[1:], strict=False):
        shared_prefix = len(previous.prompt_ids)
        assert turn.prompt_ids[:shared_prefix] == previous.prompt_ids
        added = tokenizer().decode(turn.prompt_ids[shared_prefix:])
        user = f"<|im_start|>user\n{previous.user_message}<|im_end|>\n"
        assert added == f"I see.<|im_end|>\n{user}<|im_start|>assistant\n"
    samples = to_samples(dialogue)
    assert [sample.turn_index for sample in samples] == [0, 1, 2]
    assert [sum(sample.loss_mask) for sample in samples] == [len(turn.reply_ids) for turn in dialogue.turns]


@pytest.mark.parametrize(
    ("text", "reply"),
    [("I see.", "I see."), ("<think>a</think>b</think>I see.", "I see."), ("<think>I see.", "")],
)
def test_a_broken_format_ends_training_dialogues_and_is_counted_in_evaluation(
    thinker: Renderer, text: str, reply: str
) -> None:
    ended = hold(thinker, generate=replying(thinker, text))
    assert ended.end_reason is EndReason.MALFORMED and ended.final_emotion == 30.0
    assert [(turn.reply, turn.well_formed, turn.appraisal) for turn in ended.turns] == [(reply, False, None)]
    lenient = hold(thinker, generate=replying(thinker, text), limits=replace(LIMITS, strict_format=False))
    # Silence is heard, too: a dialogue that it ended would keep its emotion.
    assert lenient.end_reason is EndReason.MAX_TURNS and len(lenient.turns) == 3
    assert all(
        turn.reply == reply and not turn.well_formed and turn.appraisal is not None for turn in lenient.turns
    )


def test_a_reply_cut_while_thinking_is_malformed_and_one_cut_later_is_heard(thinker: Renderer) -> None:
    thinking = hold(thinker, generate=replying(thinker, "<think>They are", finish_reason="length"))
    assert (
        thinking.end_reason is EndReason.MALFORMED
        and thinking.turns[0].truncated
        and not thinking.turns[0].well_formed
    )
    speaking = hold(
        thinker, generate=replying(thinker, "<think>They are sad.</think>I he", finish_reason="length")
    )
    assert speaking.end_reason is EndReason.MAX_TURNS
    assert all(turn.truncated and turn.well_formed and turn.reply == "I he" for turn in speaking.turns)


def test_user_that_never_ends_is_stopped_by_the_turn_limit(renderer: Renderer) -> None:
    async def endless(request: UserRequest) -> UserResponse:
        return await respond(replace(request, max_turns=99))

    dialogue = hold(renderer, respond=endless)
    assert dialogue.end_reason is EndReason.MAX_TURNS and len(dialogue.turns) == 3


def test_failures_are_data(renderer: Renderer) -> None:
    async def dead(request: GenerateRequest) -> Generation:
        raise ConnectionError("engine 2\nis gone")

    async def stuck(request: UserRequest) -> UserResponse:
        if request.turn_index == 1:
            await asyncio.sleep(10)
        return await respond(request)

    async def mute(request: UserRequest) -> UserResponse:
        return replace(await respond(request), message=None, end_reason=None)

    failed = hold(renderer, generate=dead)
    assert failed.end_reason is EndReason.INFRASTRUCTURE and failed.turns == []
    assert failed.error == "rollout engine: ConnectionError: engine 2 is gone"
    late = hold(renderer, respond=stuck, limits=replace(LIMITS, request_timeout_s=0.05))
    assert late.end_reason is EndReason.INFRASTRUCTURE and late.final_emotion == 35.0
    assert late.error == "user simulator: no answer within 0.05 s (rollout.request_timeout_s)"
    assert [turn.appraisal is None for turn in late.turns] == [False, True]
    assert hold(renderer, respond=mute).error == "user simulator: gave no opening"


def test_dialogues_run_freely_up_to_the_limit_and_come_back_sorted(renderer: Renderer) -> None:
    """The first dialogue's engine waits until another one is over, so lock-step turns would never finish."""
    running, most = 0, 0
    over = asyncio.Event()
    reply = replying(renderer)
    settled, replies = 0, 0

    async def generate(request: GenerateRequest) -> Generation:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if request.dialogue_id == "d3":
            await over.wait()
        await asyncio.sleep(0)
        running -= 1
        return await reply(request)

    def on_progress(more: int, turn: Turn | None) -> None:
        nonlocal settled, replies
        settled += more
        replies += turn is not None
        if turn is None:  # the first dialogue has ended
            over.set()

    tasks = [task(f"d{index}", seed=index) for index in (3, 1, 2, 0)]
    limits = replace(LIMITS, max_concurrent=2)
    call = collect(
        tasks, generate=generate, respond=respond, renderer=renderer, limits=limits, on_progress=on_progress
    )
    dialogues = asyncio.run(call)
    assert [dialogue.id for dialogue in dialogues] == ["d0", "d1", "d2", "d3"]
    assert all(dialogue.end_reason is EndReason.MAX_TURNS for dialogue in dialogues)
    assert most == 2
    assert (
        (settled, replies)
        == (4 * LIMITS.max_turns, sum(len(dialogue.turns) for dialogue in dialogues))
        == (12, 12)
    )


def test_a_dialogue_that_ends_early_settles_the_turns_that_it_will_not_have(renderer: Renderer) -> None:
    async def leave(request: UserRequest) -> UserResponse:
        answer = await respond(request)
        return (
            answer if request.turn_index < 0 else replace(answer, message=None, end_reason=EndReason.GOODBYE)
        )

    heard: list[tuple[int, bool]] = []
    call = collect(
        [task("a")],
        generate=replying(renderer),
        respond=leave,
        renderer=renderer,
        limits=LIMITS,
        on_progress=lambda more, turn: heard.append((more, turn is not None)),
    )
    asyncio.run(call)
    assert heard == [(1, True), (LIMITS.max_turns - 1, False)]


def test_cancellation_propagates(renderer: Renderer) -> None:
    started = asyncio.Event()
    cancelled: list[str] = []

    async def hang(request: GenerateRequest) -> Generation:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(request.dialogue_id)
            raise
        raise AssertionError("unreachable")

    async def interrupt() -> None:
        call = collect(
            [task("a"), task("b")], generate=hang, respond=respond, renderer=renderer, limits=LIMITS
        )
        collecting = asyncio.create_task(call)
        await started.wait()
        await asyncio.sleep(0)
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting

    asyncio.run(interrupt())
    assert sorted(cancelled) == ["a", "b"]


def test_a_used_up_budget_ends_the_collection_and_every_dialogue_in_flight(renderer: Renderer) -> None:
    cancelled = []

    async def broke(request: UserRequest) -> UserResponse:
        if request.turn_index < 0:
            return await respond(request)
        if request.dialogue_id == "d2":
            raise BudgetError("max_cost is used up")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(request.dialogue_id)
            raise
        return await respond(request)

    tasks = [task(f"d{index}") for index in range(4)]
    with pytest.raises(BudgetError, match="max_cost is used up"):
        asyncio.run(
            collect(tasks, generate=replying(renderer), respond=broke, renderer=renderer, limits=LIMITS)
        )
    assert sorted(cancelled) == ["d0", "d1", "d3"]
