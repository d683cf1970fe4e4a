"""Supervised warm-up: what a model that cannot follow the think format imitates, and the format is all it is
meant to learn.

Everything is the model's own. It holds dialogues with training personas under the prompt without thinking.
For each finished reply it is asked, in a chat of its own with three worked examples, what the user feels and
needs; the examples give the thoughts their form. Thought and reply, after the prompt with thinking and the
history as it was heard, become a sample; beside it stands the reply after the prompt without thinking, where
the learner asks the base model how likely each next token is. Nothing is chosen by what it is worth or how
long it is: a reply that was cut at the token limit counts up to the cut and without an end.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.errors import ConfigError
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, RespondFn
from rlver_dist.rollout.renderer import Renderer, system_prompt
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.trainer.checkpoints import WARM_START
from rlver_dist.trainer.components import KeepFn, Parts, followed, kept_dialogues, rollout, train_limits

THOUGHT_SYSTEM_PROMPT = "You tell a person in one short sentence what they feel and need."
THOUGHT_QUESTION = '"{message}" What do I feel and need?'
THOUGHT_EXAMPLES = (
    ("My dog died last week. The house is so quiet.", "You miss your dog and want company."),
    ("I got the job! I start on Monday.", "You are proud and want someone to cheer with you."),
    ("My boss shouted at me in front of everyone.", "You feel humiliated and need someone on your side."),
)
"""Worked exchanges before each question, without which a small model retells the message at length. They
speak to the person: a small model's replies take over how its thoughts speak, and a friend who is spoken of
as "they" is not spoken to."""
THOUGHT_TEMPERATURE = 0.7
"""Of the thoughts; hotter ones of a small model have little to do with the message."""
SEED_STREAM = -1
"""Stands where training has the number of an iteration, so that no seed of training is used here."""

_TAGS = re.compile(r"<[^<>]*>|[<>]")
_WHOLE_SENTENCES = re.compile(r".*[.!?][\"')\]]*(?=\s|$)")


class RolloutFn(Protocol):
    """Holds dialogues, under a name that is shown meanwhile: `collector.collect` with the engines already
    bound."""

    async def __call__(
        self,
        name: str,
        tasks: list[DialogueTask],
        users: RespondFn,
        limits: CollectLimits,
        renderer: Renderer,
    ) -> list[Dialogue]:
        """One dialogue a task, sorted by id."""
        ...


class ThoughtRenderer(Renderer):
    """The chat in which a model is asked for a thought; every first prompt holds the worked examples before
    the question."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, THOUGHT_SYSTEM_PROMPT)
        for message, thought in THOUGHT_EXAMPLES:
            question = self._encode_text(THOUGHT_QUESTION.format(message=message))
            self._head += [*question, *self._generation, *self.encode_reply("", thought), *self._glue]


def reply_tasks(config: RunConfig, personas: Sequence[Persona]) -> list[DialogueTask]:
    """The dialogues whose replies are learned from, by number, each with a persona drawn apart from
    training's order."""
    drawn = PersonaSampler(personas, derive_seed(config.seed, SEED_STREAM)).next(config.warm_up.dialogues)
    names = [f"warm_up-{number:04d}" for number in range(len(drawn))]
    return [
        DialogueTask(
            id=name, group_id=name, persona=persona, seed=derive_seed(config.seed, SEED_STREAM, number)
        )
        for number, (name, persona) in enumerate(zip(names, drawn, strict=True))
    ]


def reply_limits(config: RunConfig, limits: CollectLimits) -> CollectLimits:
    """Limits of these dialogues, which are held without thinking; `limits` are training's."""
    return replace(
        limits, max_turns=config.warm_up.max_turns, max_reply_tokens=config.rollout.max_reply_tokens
    )


async def warm_up_samples(
    dialogues: list[Dialogue],
    *,
    config: RunConfig,
    tokenizer: Any,
    personas: Sequence[Persona],
    limits: CollectLimits,
    collect: RolloutFn,
) -> list[ImitationSample]:
    """Sample a thought for each reply and put them together; equal configurations and weights give equal
    samples.

    Args:
        dialogues: of `reply_tasks` under `reply_limits`.
        config: of the run.
        tokenizer: the policy's.
        personas: of training.
        limits: of training's dialogues; thought and reply of a sample stay within `max_reply_tokens`.
        collect: see `RolloutFn`.

    Returns:
        One sample a reply, each dialogue a group of its own, with log-probs 0; in dialogue and turn order.

    Raises:
        ConfigError: there are fewer samples than one batch takes.
    """
    plain = Renderer(tokenizer, system_prompt(config.model, think=False))
    asked = _questions(dialogues, reply_tasks(config, personas))
    answers = await collect(
        "warm-up: thoughts", *asked, _thought_limits(config, limits), ThoughtRenderer(tokenizer)
    )
    thoughts = {
        answer.id: clean_thought(turn.reply, cut=turn.truncated)
        for answer in answers
        for turn in answer.turns
    }
    thinking = Renderer(tokenizer, system_prompt(config.model, think=True), think=True)
    samples = [
        sample for dialogue in dialogues for sample in _samples(dialogue, thoughts, plain, thinking, limits)
    ]
    if len(samples) < config.warm_up.batch_size:
        raise _too_few(config, samples, [*dialogues, *answers])
    return samples


def clean_thought(text: str, *, cut: bool) -> str:
    """`text` in one line and without tags; where it was cut at the token limit only its whole sentences,
    which may be none."""
    line = " ".join(_TAGS.sub(" ", text).split())
    if not cut:
        return line
    whole = _WHOLE_SENTENCES.match(line)
    return whole.group() if whole else ""


def _key(dialogue: Dialogue, turn: Turn) -> str:
    return f"{dialogue.id}-t{turn.index}"


def _exchanges(dialogue: Dialogue) -> Iterator[tuple[Turn, str]]:
    """Each turn with the user's message that it answers."""
    message: str | None = dialogue.opening
    for turn in dialogue.turns:
        assert message is not None, "a dialogue goes on only after a message"
        yield turn, message
        message = turn.user_message


def _questions(dialogues: list[Dialogue], held: list[DialogueTask]) -> tuple[list[DialogueTask], RespondFn]:
    """The thoughts that are asked for, as dialogues of one turn with the key of a sample as id, and the user
    who asks for them."""
    personas = {task.id: task.persona for task in held}
    tasks, told = [], {}
    for dialogue in dialogues:
        for turn, message in _exchanges(dialogue):
            if turn.reply:
                key = _key(dialogue, turn)
                seed = derive_seed(dialogue.seed, turn.index, SEED_STREAM)
                tasks.append(DialogueTask(id=key, group_id=key, persona=personas[dialogue.id], seed=seed))
                told[key] = message

    async def ask(request: UserRequest) -> UserResponse:
        if request.turn_index < 0:
            question = THOUGHT_QUESTION.format(message=told[request.dialogue_id])
            return UserResponse(appraisal=None, emotion=request.emotion, message=question, end_reason=None)
        return UserResponse(
            appraisal=None, emotion=request.emotion, message=None, end_reason=EndReason.GOODBYE
        )

    return tasks, ask


def _thought_limits(config: RunConfig, limits: CollectLimits) -> CollectLimits:
    return replace(
        limits,
        max_turns=1,
        max_reply_tokens=config.warm_up.max_thought_tokens,
        temperature=THOUGHT_TEMPERATURE,
    )


def _samples(
    dialogue: Dialogue,
    thoughts: Mapping[str, str],
    plain: Renderer,
    thinking: Renderer,
    limits: CollectLimits,
) -> Iterator[ImitationSample]:
    """A sample for each reply of a dialogue that has a thought and fits the limits with it."""
    prompt_ids: list[int] = []
    said: Turn | None = None
    for turn, message in _exchanges(dialogue):
        prompt_ids = (
            thinking.next_prompt(prompt_ids, said.reply_ids, said.reply, message)
            if said
            else thinking.opening_prompt(message)
        )
        said = turn
        if not thoughts.get(_key(dialogue, turn)):
            continue
        try:
            reply_ids, plain_ids = (
                one.encode_reply(thoughts[_key(dialogue, turn)], turn.reply) for one in (thinking, plain)
            )
        except ValueError:  # a reply with a tag in it
            continue
        if turn.truncated:
            reply_ids, plain_ids = reply_ids[:-1], plain_ids[:-1]
        if (
            len(reply_ids) <= limits.max_reply_tokens
            and len(prompt_ids) + len(reply_ids) <= limits.max_context_tokens
        ):
            own = len(plain_ids) - _common_end(reply_ids, plain_ids)
            yield ImitationSample(
                sample=_sample(dialogue.id, turn.index, prompt_ids, reply_ids),
                plain=_sample(dialogue.id, turn.index, [*turn.prompt_ids, *plain_ids[:own]], plain_ids[own:]),
            )


def _common_end(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both end with. A reply's first tokens may depend on what is before it, in some
    vocabularies."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _sample(dialogue_id: str, turn_index: int, context_ids: list[int], trained_ids: list[int]) -> TurnSample:
    length = len(context_ids) + len(trained_ids)
    return TurnSample(
        token_ids=[*context_ids, *trained_ids],
        loss_mask=[False] * len(context_ids) + [True] * len(trained_ids),
        rollout_logprobs=[0.0] * length,
        dialogue_id=dialogue_id,
        group_id=dialogue_id,
        turn_index=turn_index,
    )


def _too_few(config: RunConfig, samples: list[ImitationSample], held: list[Dialogue]) -> ConfigError:
    warm_up = config.warm_up
    failures = [dialogue.error for dialogue in held if dialogue.error]
    failed = f" ({len(failures)} of the dialogues failed, the first with: {failures[0]})" if failures else ""
    return ConfigError(
        f"warm_up.dialogues={warm_up.dialogues}: gave {len(samples)} replies with a thought, fewer than "
        f"warm_up.batch_size={warm_up.batch_size}{failed}; raise warm_up.dialogues, "
        f"warm_up.max_thought_tokens, "
        "rollout.max_thinking_tokens or rollout.max_reply_tokens, or lower warm_up.batch_size"
    )


async def warm_up_dialogues(
    *, config: RunConfig, parts: Parts, train: Sequence[Persona], kept: str | None, keep: KeepFn
) -> list[Dialogue]:
    """Hold the dialogues whose replies are learned from, and write them to the ledger.

    Args:
        config: of the run.
        parts: of the run.
        train: whom the replies are told to.
        kept: limits of the dialogues that an interrupted start has left in the ledger (`kept_dialogues`).
        keep: called as soon as the ledger has them.
    """
    path = dialogues_path(Path(config.output_dir), phase=Phase.warm_up, iteration=0)
    tasks, limits = reply_tasks(config, train), reply_limits(config, train_limits(config))
    dialogues = kept_dialogues(path, tasks, limits, kept)
    if dialogues is None:
        dialogues = await rollout(parts, "warm-up: replies", tasks, parts.users, limits, parts.plain_renderer)
        write_dialogues(path, dialogues, iteration=0, phase=Phase.warm_up, rewards={})
        await keep(Phase.warm_up, repr(limits))
    return dialogues


async def warm_up(
    dialogues: list[Dialogue], *, config: RunConfig, parts: Parts, train: Sequence[Persona]
) -> None:
    """Teach the policy the think format on `warm_up_dialogues`, export the result and bring the engines to
    it."""
    samples = await warm_up_samples(
        dialogues,
        config=config,
        tokenizer=parts.tokenizer,
        personas=train,
        limits=train_limits(config),
        collect=functools.partial(rollout, parts),
    )
    imitating = parts.policy.imitate(samples, config.warm_up, config.seed)
    values = reduce_metrics(await followed(parts, "warm-up: imitation", imitating, "replies"))
    parts.console.note(
        f"warm-up: {len(samples)} replies, nats a token: format {values['warm_up/format_nll_first']:.2f} -> "
        f"{values['warm_up/format_nll_last']:.2f}, replies from the base model "
        f"{values['warm_up/reply_kl_first']:.2f} -> "
        f"{values['warm_up/reply_kl_last']:.2f}"
    )
    await parts.policy.export(Path(config.output_dir) / WARM_START)
    await parts.sync(0)
