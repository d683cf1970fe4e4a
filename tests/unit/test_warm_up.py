"""The warm-up's samples: whose text they hold, under which prompt, and what is left out. The model is a small
scripted function."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import EndReason
from rlver_dist.errors import ConfigError
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, GenerateRequest, Generation, collect
from rlver_dist.rollout.renderer import Renderer, system_prompt
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.trainer.warm_up import (
    THOUGHT_EXAMPLES,
    ThoughtRenderer,
    clean_thought,
    reply_limits,
    reply_tasks,
    warm_up_samples,
)
from tests.unit import builders

CONFIG = RunConfig(
    model=ModelConfig(path=SMOLLM2),
    rollout=RolloutConfig(think=True, max_reply_tokens=24, max_thinking_tokens=24),
    warm_up=WarmUpConfig(dialogues=3, max_turns=2, max_thought_tokens=16, batch_size=4),
)
LIMITS = builders.limits(max_turns=8, max_reply_tokens=48, temperature=0.9, max_concurrent=2)
PERSONAS = load_split("bank", "train")[:5]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve(SMOLLM2))


async def respond(request: UserRequest) -> UserResponse:
    """A user with two messages who leaves after the last reply."""
    if request.turn_index < 0:
        return UserResponse(appraisal=None, emotion=30.0, message=request.persona.opening, end_reason=None)
    last = request.turn_index == request.max_turns - 1
    return UserResponse(
        appraisal=None,
        emotion=31.0,
        message=None if last else "It was a long day.",
        end_reason=EndReason.MAX_TURNS if last else None,
    )


@dataclass
class Model:
    """Answers prompts that ask for a thought with `thought`, all others with `reply`; "..." at the end stands
    for a cut text."""

    tokenizer: Any
    reply: Callable[[GenerateRequest], str] = lambda request: f"I hear you, {request.seed % 97}."
    thought: Callable[[GenerateRequest], str] = lambda request: "They are tired and want rest."

    def __post_init__(self) -> None:
        self.asked: list[tuple[str, GenerateRequest]] = []

    async def __call__(self, request: GenerateRequest) -> Generation:
        prompt = self.tokenizer.decode(request.prompt_ids)
        text = (self.thought if "What do I feel" in prompt else self.reply)(request)
        self.asked.append((prompt, request))
        ids = self.tokenizer.encode(text.removesuffix("..."), add_special_tokens=False)
        cut = text.endswith("...")
        ids = ids if cut else [*ids, self.tokenizer.convert_tokens_to_ids("<|im_end|>")]
        return Generation(
            token_ids=ids,
            logprobs=[-1.0] * len(ids),
            finish_reason="length" if cut else "stop",
            policy_version=(0, 0),
        )


def make(
    model: Callable[[GenerateRequest], Awaitable[Generation]], tokenizer: Any, config=CONFIG, limits=LIMITS
) -> list[ImitationSample]:
    async def hold(name: str, tasks: list[DialogueTask], users, limits: CollectLimits, renderer: Renderer):
        assert name.startswith("warm-up")
        return await collect(tasks, generate=model, respond=users, renderer=renderer, limits=limits)

    async def both() -> list[ImitationSample]:
        plain = Renderer(tokenizer, system_prompt(config.model, think=False))
        tasks = reply_tasks(PERSONAS, config.warm_up.dialogues, config.seed)
        limited = reply_limits(limits, config.warm_up, config.rollout)
        return await warm_up_samples(
            await hold("warm-up: replies", tasks, respond, limited, plain),
            tasks=tasks,
            warm_up=config.warm_up,
            tokenizer=tokenizer,
            plain=plain,
            thinking=Renderer(tokenizer, system_prompt(config.model, think=True), think=True),
            limits=limits,
            collect=hold,
        )

    return asyncio.run(both())


def target(sample: TurnSample, tokenizer: Any) -> str:
    return tokenizer.decode(
        [token for token, trained in zip(sample.token_ids, sample.loss_mask, strict=True) if trained]
    )


def test_samples_hold_the_models_own_thought_and_reply_under_the_think_prompt(tokenizer: Any) -> None:
    model = Model(tokenizer)
    pairs = make(model, tokenizer)
    samples = [pair.sample for pair in pairs]
    # Samples of a dialogue share their history in training.
    assert [sample.dialogue_id for sample in samples] == [
        f"warm_up-{n:04d}" for n in range(3) for _ in (0, 1)
    ]
    assert [sample.turn_index for sample in samples] == [0, 1] * 3
    thinking = Renderer(tokenizer, system_prompt(CONFIG.model, think=True), think=True)
    replies = {(request.dialogue_id, request.turn_index): request for _, request in model.asked}
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        said = [
            f"I hear you, {replies[sample.dialogue_id, sample.turn_index].seed % 97}."
            for sample in (first, second)
        ]
        for sample, reply in zip((first, second), said, strict=True):
            assert (
                target(sample, tokenizer)
                == f"<think>They are tired and want rest.</think>\n{reply}<|im_end|>"
            )
            assert sample.group_id == sample.dialogue_id
            assert len(sample.token_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs) and not any(
                sample.rollout_logprobs
            )
        opening = next(
            persona.opening for persona in PERSONAS if persona.opening in tokenizer.decode(first.token_ids)
        )
        prompt = thinking.opening_prompt(opening)
        assert first.token_ids[: first.loss_mask.index(True)] == prompt
        assert second.token_ids[: second.loss_mask.index(True)] == thinking.next_prompt(
            prompt, [], said[0], "It was a long day."
        )
    for pair in pairs:
        asked = replies[pair.sample.dialogue_id, pair.sample.turn_index]
        reply = f"I hear you, {asked.seed % 97}.<|im_end|>"
        assert (
            pair.plain.token_ids == [*asked.prompt_ids, *tokenizer.encode(reply)]
            and target(pair.plain, tokenizer) == reply
        )
        trained = [one.token_ids[-pair.plain.num_trained :] for one in (pair.sample, pair.plain)]
        assert trained[0] == trained[1] and (pair.plain.dialogue_id, pair.plain.turn_index) == (
            pair.sample.dialogue_id,
            asked.turn_index,
        )


def test_tokens_that_what_is_before_them_changes_are_not_compared(tokenizer: Any) -> None:
    """A vocabulary in which a line break and what follows it are one token, as `_encode_text` of the think
    format would meet it."""

    class Joining:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode(self, text: str, **options: Any) -> list[int]:
            ids = tokenizer.encode(text, **options)
            return [11, *ids[2:]] if text.startswith("\nI hear") else ids

    pairs = make(Model(tokenizer), Joining())
    assert len(pairs) == 6
    for pair in pairs:
        assert target(pair.sample, tokenizer).endswith(target(pair.plain, tokenizer)) and target(
            pair.plain, tokenizer
        ).startswith(" hear you")
        assert tokenizer.decode(pair.plain.token_ids).endswith("assistant\nI" + target(pair.plain, tokenizer))


def test_the_model_is_asked_without_thinking_then_for_thoughts(tokenizer: Any) -> None:
    model = Model(tokenizer)
    make(model, tokenizer)
    replies = [request for prompt, request in model.asked if "What do I feel" not in prompt]
    thoughts = {
        request.dialogue_id: (prompt, request)
        for prompt, request in model.asked
        if "What do I feel" in prompt
    }
    assert len(replies) == len(thoughts) == 6
    assert all(
        "<think>" not in prompt and CONFIG.model.think_instruction not in prompt for prompt, _ in model.asked
    )
    assert {request.max_tokens for request in replies} == {24} and {
        request.temperature for request in replies
    } == {0.9}
    assert {request.max_tokens for _, request in thoughts.values()} == {16}
    for key, (prompt, _) in thoughts.items():
        last = prompt.split("<|im_start|>user\n")[-1]
        assert ("It was a long day." in last) == key.endswith("-t1")
        assert all(f"<|im_start|>assistant\n{thought}<|im_end|>" in prompt for _, thought in THOUGHT_EXAMPLES)
    seeds = [request.seed for _, request in model.asked]
    assert len(set(seeds)) == len(seeds)


def test_samples_repeat_with_the_seed_alone(tokenizer: Any) -> None:
    assert make(Model(tokenizer), tokenizer) == make(Model(tokenizer), tokenizer)
    assert make(Model(tokenizer), tokenizer) != make(Model(tokenizer), tokenizer, replace(CONFIG, seed=2))


def test_the_chat_for_thoughts_is_the_templates_own(tokenizer: Any) -> None:
    prompt = ThoughtRenderer(tokenizer).opening_prompt("Why?")
    chat = tokenizer.decode(prompt)
    assert chat.count("<|im_start|>user\n") == len(THOUGHT_EXAMPLES) + 1
    assert chat.endswith("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat, add_special_tokens=False) == prompt


@pytest.mark.parametrize(
    ("text", "cut", "thought"),
    [
        ("They are sad.", False, "They are sad."),
        ("They are sad", False, "They are sad"),
        (" They are\n\nsad. ", False, "They are sad."),
        ("<think>They are sad.</think>", False, "They are sad."),
        ("<th<think>ink>They", False, "th ink They"),
        ("They are sad. They need", True, "They are sad."),
        ('She said "no." Then he', True, 'She said "no."'),
        ("It is 3.5 miles", True, ""),
        ("They are sad and", True, ""),
        ("", False, ""),
    ],
)
def test_thoughts_are_one_line_of_whole_sentences(text: str, cut: bool, thought: str) -> None:
    assert clean_thought(text, cut=cut) == thought


@pytest.mark.parametrize(
    "parts",
    [
        {"reply": lambda request: "Say </think> or" if request.turn_index == 0 else "I see."},
        {"thought": lambda request: "They are..." if request.dialogue_id.endswith("-t0") else "They wait."},
        {
            "thought": lambda request: (
                "They are " + "so " * 40 + "sad." if request.dialogue_id.endswith("-t0") else "They wait."
            )
        },
    ],
    ids=["reply with a tag", "thought without a whole sentence", "longer than a reply may be"],
)
def test_what_cannot_be_imitated_is_left_out(tokenizer: Any, parts: dict) -> None:
    config = replace(CONFIG, warm_up=replace(CONFIG.warm_up, batch_size=3))
    samples = make(Model(tokenizer, **parts), tokenizer, config)
    assert [pair.sample.turn_index for pair in samples] == [1, 1, 1]


def test_a_cut_reply_is_imitated_up_to_the_cut_and_without_an_end(tokenizer: Any) -> None:
    samples = make(
        Model(tokenizer, reply=lambda request: "It is..." if request.turn_index == 0 else "I see."), tokenizer
    )
    for cut, whole in zip(samples[::2], samples[1::2], strict=True):
        assert target(cut.sample, tokenizer) == "<think>They are tired and want rest.</think>\nIt is"
        assert (
            target(whole.sample, tokenizer)
            == "<think>They are tired and want rest.</think>\nI see.<|im_end|>"
        )
        assert [target(pair.plain, tokenizer) for pair in (cut, whole)] == ["It is", "I see.<|im_end|>"]


def test_too_few_samples_name_the_options(tokenizer: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"warm_up.dialogues=3: gave 0 replies.*warm_up.batch_size=4; raise"
    ):
        make(Model(tokenizer, thought=lambda request: "They are..."), tokenizer)

    async def dead(request: GenerateRequest) -> Generation:
        raise ConnectionError("engine 2 is gone")

    with pytest.raises(ConfigError, match=r"3 of the dialogues failed, the first with: .*engine 2 is gone"):
        make(dead, tokenizer)
