"""Held-out evaluation: what a policy's dialogues with the evaluation personas are worth, and the controls.

Emotion under the users' own judge says whether the reward rose; the same dialogues appraised by a second one
that training never hears say whether that is more than one judge's taste; distinct-2 and the base model's
perplexity say whether the language held. All of these look at the reply text alone, so that they mean the
same with and without thinking; how well the format is kept stands apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlver_dist.concurrency import all_or_none
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue, Message, Role, completed
from rlver_dist.errors import BoundaryError
from rlver_dist.evaluation.statistics import paired_bootstrap
from rlver_dist.experience.samples import TurnSample, to_samples
from rlver_dist.rollout.collector import DialogueTask
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.emotion import EmotionRules, move
from rlver_dist.simulator.protocol import Judge, UserRequest
from rlver_dist.tracking.dialogue_metrics import distinct_n
from rlver_dist.tracking.metrics import Summary

BOOTSTRAP_SEED = 0
"""Fixed, so that equal results always have equal intervals."""


@dataclass(kw_only=True, slots=True)
class HeldOut:
    """One evaluation's results, JSON-able; lists are ordered as `persona_ids`.

    Attributes:
        persona_ids: personas whose dialogue was completed.
        emotion: final emotion of each dialogue, 0 to 100.
        second_emotion: the same dialogues' final emotion under the second judge, None where it failed; empty
            without one.
        distinct2: distinct bigrams over bigrams of all replies.
        thinking_distinct2: the same of all thoughts, which no judge hears and no guard reads; 0 without
            thinking.
        perplexity: the base model's, of the replies in their dialogues (`visible_samples`).
        well_formed: share of all turns whose reply kept the format.
        failed: dialogues lost to infrastructure.
        judges: who gave `emotion` and, where there is a second one, who gave `second_emotion`.
        second_judge_counts: `Judge.metrics` of the second one for these dialogues; calls, tokens and cost
            where it is asked over HTTP.
    """

    persona_ids: list[str]
    emotion: list[float]
    second_emotion: list[float | None]
    distinct2: float
    thinking_distinct2: float = 0.0
    perplexity: float
    well_formed: float
    failed: int
    judges: list[str] = field(default_factory=list)
    second_judge_counts: dict[str, float] = field(default_factory=dict)


def evaluation_tasks(personas: Sequence[Persona], *, phase: str, seed: int) -> list[DialogueTask]:
    """One dialogue a persona; ids carry the phase, seeds do not, so that before and after differ by the
    weights alone."""
    return [
        DialogueTask(
            id=f"{phase}-{index:04d}", group_id=persona.id, persona=persona, seed=derive_seed(seed, index)
        )
        for index, persona in enumerate(personas)
    ]


async def reappraise(dialogue: Dialogue, persona: Persona, judge: Judge, rules: EmotionRules) -> float:
    """Final emotion of a finished dialogue had `judge` been the user; what was said stays as it was."""
    # The emotion moves by this judge's appraisals alone, from where the dialogue began.
    emotion = dialogue.start_emotion
    heard = [Message(role=Role.USER, text=dialogue.opening)]
    for turn in dialogue.turns:
        if turn.appraisal is None:  # a reply that ended the dialogue unheard
            break
        heard.append(Message(role=Role.ASSISTANT, text=turn.reply))
        request = UserRequest(
            dialogue_id=dialogue.id,
            turn_index=turn.index,
            persona=persona,
            messages=tuple(heard),
            emotion=emotion,
            seed=dialogue.seed,
            max_turns=len(dialogue.turns),
            truncated=turn.truncated,
        )
        emotion = move(emotion, (await judge.appraise(request)).change, rules)
        if turn.user_message is not None:
            heard.append(Message(role=Role.USER, text=turn.user_message))
    return emotion


async def second_emotions(
    dialogues: Sequence[Dialogue], personas: Sequence[Persona], judge: Judge, rules: EmotionRules
) -> list[float | None]:
    """Final emotion under `judge` of each dialogue that infrastructure did not end, in order; None where the
    judge failed."""
    by_id = {persona.id: persona for persona in personas}

    async def one(dialogue: Dialogue) -> float | None:
        try:
            return await reappraise(dialogue, by_id[dialogue.persona_id], judge, rules)
        # One failed call must not cost the evaluation: the pair is left out of the comparison.
        except BoundaryError:
            return None

    return await all_or_none(one(dialogue) for dialogue in completed(dialogues))


def visible_samples(dialogues: Sequence[Dialogue], renderer: Renderer) -> list[TurnSample]:
    """The dialogues as both sides heard them, for scoring replies: one row a dialogue, its mask on the
    replies.

    Every reply is encoded from its text; its end token counts as part of it unless it was cut. A turn without
    one is silence there.

    Args:
        dialogues: infrastructure failures are left out.
        renderer: of the scoring model, without thinking whatever the dialogues were held with, so that all
            scores compare.

    Raises:
        ValueError: the renderer asks for thinking.
    """
    if renderer.think:
        raise ValueError("replies are scored without thinking; pass a renderer with think=False")
    return [
        sample for dialogue in completed(dialogues) for sample in to_samples(_as_heard(dialogue, renderer))
    ]


def _as_heard(dialogue: Dialogue, renderer: Renderer) -> Dialogue:
    """The dialogue with token ids encoded anew from its texts; their log-probs are 0."""
    prompt_ids = renderer.opening_prompt(dialogue.opening)
    turns = []
    for turn in dialogue.turns:
        reply_ids = renderer.encode_reply("", turn.reply) if turn.reply else []
        # A cut reply has no end, so the model is not asked how likely one was.
        reply_ids = reply_ids[:-1] if turn.truncated else reply_ids
        turns.append(
            replace(turn, prompt_ids=prompt_ids, reply_ids=reply_ids, logprobs=[0.0] * len(reply_ids))
        )
        if turn.user_message is not None:
            prompt_ids = renderer.next_prompt(prompt_ids, reply_ids, turn.reply, turn.user_message)
    return replace(dialogue, turns=turns)


def summarize(
    dialogues: Sequence[Dialogue],
    *,
    second_emotion: list[float | None],
    perplexity: float,
    judges: Sequence[str],
    second_judge_counts: Mapping[str, float] | None = None,
) -> HeldOut:
    """Results of one evaluation.

    Args:
        dialogues: all of it; failed ones are counted and left out.
        second_emotion: of the completed ones, in order (`second_emotions`); empty without a second judge.
        perplexity: the base model's, of the replies.
        judges: who gave the emotions, the second judge last.
        second_judge_counts: the second judge's `Judge.metrics` for these dialogues; None without one.
    """
    complete = completed(dialogues)
    turns = [turn for dialogue in complete for turn in dialogue.turns]
    return HeldOut(
        persona_ids=[dialogue.persona_id for dialogue in complete],
        emotion=[dialogue.final_emotion for dialogue in complete],
        second_emotion=second_emotion,
        distinct2=distinct_n([turn.reply for turn in turns], 2),
        thinking_distinct2=distinct_n([turn.thinking for turn in turns], 2),
        perplexity=perplexity,
        well_formed=sum(turn.well_formed for turn in turns) / max(len(turns), 1),
        failed=len(dialogues) - len(complete),
        judges=list(judges),
        second_judge_counts=dict(second_judge_counts or {}),
    )


def compare(before: HeldOut, after: HeldOut, num_samples: int) -> Summary:
    """The figures of `summary.json`: emotion under each judge with paired intervals, and the language
    controls.

    Only personas whose dialogue was completed, and appraised by the judge in question, both times are paired.
    `second_appraiser` is there where one second judge gave both.
    """
    first = _paired(before, before.emotion, after, after.emotion, num_samples)
    compared = {
        **first,
        "num_eval_personas": first.pop("num_personas"),
        "judges": {"before": before.judges, "after": after.judges},
        "distinct2": {"before": before.distinct2, "after": after.distinct2},
        "thinking_distinct2": {"before": before.thinking_distinct2, "after": after.thinking_distinct2},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "well_formed": {"before": before.well_formed, "after": after.well_formed},
        "failed": {"before": before.failed, "after": after.failed},
    }
    if before.second_judge_counts or after.second_judge_counts:
        compared["second_judge_counts"] = {
            "before": before.second_judge_counts,
            "after": after.second_judge_counts,
        }
    # With another judge at one of the two times the difference would tell of judges, not of policies.
    if len(after.judges) == 2 and before.judges == after.judges:
        compared["second_appraiser"] = _paired(
            before, before.second_emotion, after, after.second_emotion, num_samples
        )
    return compared


def _paired(
    before: HeldOut,
    emotion_before: Sequence[float | None],
    after: HeldOut,
    emotion_after: Sequence[float | None],
    num_samples: int,
) -> Summary:
    # A persona that was lost at one of the two times says nothing of a change.
    second = dict(zip(after.persona_ids, emotion_after, strict=True))
    pairs = [
        (value, other)
        for persona, value in zip(before.persona_ids, emotion_before, strict=True)
        if value is not None and (other := second.get(persona)) is not None
    ]
    if not pairs:
        return {"before": None, "after": None, "difference": None, "interval95": None, "num_personas": 0}
    first, last = [value for value, _ in pairs], [other for _, other in pairs]
    mean_before, mean_after = sum(first) / len(pairs), sum(last) / len(pairs)
    interval = paired_bootstrap(first, last, num_samples, BOOTSTRAP_SEED)
    return {
        "before": mean_before,
        "after": mean_after,
        "difference": mean_after - mean_before,
        "interval95": list(interval),
        "num_personas": len(pairs),
    }
