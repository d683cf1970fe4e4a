"""Held-out evaluation: what a policy's dialogues with the evaluation personas are worth, and the controls.

Emotion under the training appraiser says whether the reward rose; the same dialogues appraised by one that training never sees say
whether that is more than one appraiser's taste; distinct-2 and the base model's perplexity say whether the language held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue, EndReason, Message, Role
from rlver_dist.evaluation.statistics import paired_bootstrap
from rlver_dist.rollout.collector import DialogueTask, derive_seed
from rlver_dist.simulator.appraisal import AppraisalContext, Appraiser
from rlver_dist.simulator.emotion import EmotionRules, move
from rlver_dist.tracking.dialogue_metrics import distinct_n

BOOTSTRAP_SEED = 0


@dataclass(kw_only=True, slots=True)
class HeldOut:
    """One evaluation's results, JSON-able; lists are ordered as `persona_ids`.

    Attributes:
        persona_ids: personas whose dialogue was completed.
        emotion: final emotion of each dialogue, 0 to 100.
        second_emotion: the same dialogues' final emotion under the second appraiser.
        distinct2: distinct bigrams over bigrams of all replies.
        perplexity: the base model's, of the replies in their dialogues.
        failed: dialogues lost to infrastructure.
    """

    persona_ids: list[str]
    emotion: list[float]
    second_emotion: list[float]
    distinct2: float
    perplexity: float
    failed: int


def evaluation_tasks(personas: Sequence[Persona], *, phase: str, seed: int) -> list[DialogueTask]:
    """One dialogue a persona; ids carry the phase, seeds do not, so that before and after differ by the weights alone."""
    return [
        DialogueTask(id=f"{phase}-{index:04d}", group_id=persona.id, persona=persona, seed=derive_seed(seed, index))
        for index, persona in enumerate(personas)
    ]


def reappraise(dialogue: Dialogue, persona: Persona, appraiser: Appraiser, rules: EmotionRules) -> float:
    """Final emotion of a finished dialogue had `appraiser` been the user; what was said stays as it was."""
    emotion = dialogue.start_emotion
    heard = [Message(role=Role.USER, text=dialogue.opening)]
    for turn in dialogue.turns:
        if turn.appraisal is None:  # a reply that ended the dialogue unheard
            break
        heard.append(Message(role=Role.ASSISTANT, text=turn.reply))
        context = AppraisalContext(
            persona=persona, messages=tuple(heard), emotion=emotion, acceptance=1.0, max_change=rules.max_change, truncated=turn.truncated
        )
        emotion = move(emotion, appraiser.appraise(context).change, rules)
        if turn.user_message is not None:
            heard.append(Message(role=Role.USER, text=turn.user_message))
    return emotion


def summarize(
    dialogues: Sequence[Dialogue], personas: Sequence[Persona], second: Appraiser, rules: EmotionRules, perplexity: float
) -> HeldOut:
    """Results of one evaluation; failed dialogues are counted and left out."""
    by_id = {persona.id: persona for persona in personas}
    complete = [dialogue for dialogue in dialogues if dialogue.end_reason is not EndReason.INFRASTRUCTURE]
    return HeldOut(
        persona_ids=[dialogue.persona_id for dialogue in complete],
        emotion=[dialogue.final_emotion for dialogue in complete],
        second_emotion=[reappraise(dialogue, by_id[dialogue.persona_id], second, rules) for dialogue in complete],
        distinct2=distinct_n([turn.reply for dialogue in complete for turn in dialogue.turns], 2),
        perplexity=perplexity,
        failed=len(dialogues) - len(complete),
    )


def compare(before: HeldOut, after: HeldOut, num_samples: int) -> dict[str, Any]:
    """The figures of `summary.json`: emotion under both appraisers with paired intervals, and the language controls.

    Only personas whose dialogue was completed both times are paired.
    """
    both = [persona for persona in before.persona_ids if persona in set(after.persona_ids)]

    def paired(name: str) -> dict[str, Any]:
        first = dict(zip(before.persona_ids, getattr(before, name), strict=True))
        second = dict(zip(after.persona_ids, getattr(after, name), strict=True))
        return _paired([first[persona] for persona in both], [second[persona] for persona in both], num_samples)

    return {
        **paired("emotion"),
        "num_eval_personas": len(both),
        "second_appraiser": paired("second_emotion"),
        "distinct2": {"before": before.distinct2, "after": after.distinct2},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "failed": {"before": before.failed, "after": after.failed},
    }


def _paired(before: list[float], after: list[float], num_samples: int) -> dict[str, Any]:
    if not before:
        return {"before": None, "after": None, "difference": None, "interval95": None}
    mean_before, mean_after = sum(before) / len(before), sum(after) / len(after)
    low, high = paired_bootstrap(before, after, num_samples, BOOTSTRAP_SEED)
    return {"before": mean_before, "after": mean_after, "difference": mean_after - mean_before, "interval95": [low, high]}
