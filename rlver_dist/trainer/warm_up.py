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

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.errors import ConfigError
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, RespondFn
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.protocol import UserRequest, UserResponse

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

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, THOUGHT_SYSTEM_PROMPT)
        # In the head, which all questions share: engines keep what they computed for it.
        for message, thought in THOUGHT_EXAMPLES:
            question = self._encode_text(THOUGHT_QUESTION.format(message=message))
            self._head += [*question, *self._generation, *self.encode_reply("", thought), *self._glue]


def reply_tasks(personas: Sequence[Persona], num_dialogues: int, seed: int) -> list[DialogueTask]:
    """The dialogues whose replies are learned from, by number, each with a persona drawn apart from
    training's order.

    Args:
        personas: of training.
        num_dialogues: how many.
        seed: of the run.
    """
    drawn = PersonaSampler(personas, derive_seed(seed, SEED_STREAM)).next(num_dialogues)
    names = [f"warm_up-{number:04d}" for number in range(len(drawn))]
    return [
        DialogueTask(id=name, group_id=name, persona=persona, seed=derive_seed(seed, SEED_STREAM, number))
        for number, (name, persona) in enumerate(zip(names, drawn, strict=True))
    ]


def reply_limits(limits: CollectLimits, warm_up: WarmUpConfig, rollout: RolloutConfig) -> CollectLimits:
    """Limits of these dialogues, which are held without thinking; `limits` are training's."""
    return replace(limits, max_turns=warm_up.max_turns, max_reply_tokens=rollout.max_reply_tokens)


async def warm_up_samples(
    dialogues: list[Dialogue],
    *,
    tasks: Sequence[DialogueTask],
    warm_up: WarmUpConfig,
    tokenizer: PreTrainedTokenizerBase,
    plain: Renderer,
    thinking: Renderer,
    limits: CollectLimits,
    collect: RolloutFn,
) -> list[ImitationSample]:
    """Sample a thought for each reply and put them together; equal configurations and weights give equal
    samples.

    Args:
        dialogues: of `tasks` under `reply_limits`.
        tasks: see `reply_tasks`.
        warm_up: tokens of a thought, and how many samples are enough.
        tokenizer: the policy's.
        plain: the policy's renderer without thinking, which the dialogues were held with.
        thinking: its renderer with thinking, whose format is learned.
        limits: of training's dialogues; thought and reply of a sample stay within `max_reply_tokens`.
        collect: see `RolloutFn`.

    Returns:
        One sample a reply, each dialogue a group of its own, with log-probs 0; in dialogue and turn order.

    Raises:
        ConfigError: there are fewer samples than one batch takes.
    """
    # Asked for apart and not in the dialogues: replies have to be those without thinking.
    questions, ask = _questions(dialogues, tasks)
    thought_limits = replace(
        limits,
        max_turns=1,
        max_reply_tokens=warm_up.max_thought_tokens,
        temperature=THOUGHT_TEMPERATURE,
    )
    answers = await collect("warm-up: thoughts", questions, ask, thought_limits, ThoughtRenderer(tokenizer))
    thoughts = {
        answer.id: clean_thought(turn.reply, cut=turn.truncated)
        for answer in answers
        for turn in answer.turns
    }
    samples = [
        sample for dialogue in dialogues for sample in _samples(dialogue, thoughts, plain, thinking, limits)
    ]
    if len(samples) < warm_up.batch_size:
        raise _too_few(warm_up, samples, [*dialogues, *answers])
    return samples


def clean_thought(text: str, *, cut: bool) -> str:
    """`text` in one line and without tags; where it was cut at the token limit only its whole sentences,
    which may be none."""
    # A tag inside a thought would end it when the reply is parsed.
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


def _questions(
    dialogues: Sequence[Dialogue], tasks: Sequence[DialogueTask]
) -> tuple[list[DialogueTask], RespondFn]:
    """The thoughts that are asked for, as dialogues of one turn with the key of a sample as id, and the user
    who asks for them."""
    personas = {task.id: task.persona for task in tasks}
    questions: list[DialogueTask] = []
    told: dict[str, str] = {}
    for dialogue in dialogues:
        for turn, message in _exchanges(dialogue):
            # Silence has no thought behind it that could be learned.
            if turn.reply:
                key = _key(dialogue, turn)
                seed = derive_seed(dialogue.seed, turn.index, SEED_STREAM)
                questions.append(DialogueTask(id=key, group_id=key, persona=personas[dialogue.id], seed=seed))
                told[key] = message

    # In place of a user: it says the question, and leaves after the thought.
    async def ask(request: UserRequest) -> UserResponse:
        if request.turn_index < 0:
            question = THOUGHT_QUESTION.format(message=told[request.dialogue_id])
            return UserResponse(appraisal=None, emotion=request.emotion, message=question, end_reason=None)
        return UserResponse(
            appraisal=None, emotion=request.emotion, message=None, end_reason=EndReason.GOODBYE
        )

    return questions, ask


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
        # Also where this reply is left out, it stays in the history of the next one.
        if not thoughts.get(_key(dialogue, turn)):
            continue
        try:
            reply_ids, plain_ids = (
                one.encode_reply(thoughts[_key(dialogue, turn)], turn.reply) for one in (thinking, plain)
            )
        except ValueError:  # a reply with a tag in it
            continue
        # A cut reply teaches no end: its end token was never sampled.
        if turn.truncated:
            reply_ids, plain_ids = reply_ids[:-1], plain_ids[:-1]
        if (
            len(reply_ids) <= limits.max_reply_tokens
            and len(prompt_ids) + len(reply_ids) <= limits.max_context_tokens
        ):
            # The base model is asked for the same tokens alone, so those that differ belong to the prompt.
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


def _too_few(
    warm_up: WarmUpConfig, samples: Sequence[ImitationSample], dialogues: Sequence[Dialogue]
) -> ConfigError:
    failures = [dialogue.error for dialogue in dialogues if dialogue.error]
    failed = f" ({len(failures)} of the dialogues failed, the first with: {failures[0]})" if failures else ""
    return ConfigError(
        f"warm_up.dialogues={warm_up.dialogues}: gave {len(samples)} replies with a thought, fewer than "
        f"warm_up.batch_size={warm_up.batch_size}{failed}; raise warm_up.dialogues, "
        f"warm_up.max_thought_tokens, "
        "rollout.max_thinking_tokens or rollout.max_reply_tokens, or lower warm_up.batch_size"
    )
