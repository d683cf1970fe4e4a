"""Metrics of one iteration's dialogues: the `rollout/`, `reward/` and `judges/` keys of docs/metrics.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from rlver_dist.dialogue import Dialogue, EndReason, Turn, completed
from rlver_dist.simulator.emotion import CEILING, FLOOR
from rlver_dist.simulator.llm.judges import DISAGREEMENT, JUDGE_CHANGE, SPREAD
from rlver_dist.text import ngrams
from rlver_dist.tracking.metrics import Metric, Reduction, mean_metric


def dialogue_metrics(dialogues: Sequence[Dialogue], rewards: Mapping[str, float]) -> list[Metric]:
    """Describe one iteration's dialogues.

    Args:
        dialogues: all of them; infrastructure failures are counted and enter no mean.
        rewards: 0 to 1 by dialogue id, of those dialogues that were scored.

    Returns:
        Metrics of all dialogues at once; their means carry the number of dialogues, turns or rewards as
            weight. The standard deviation is the population's and does not combine over shards.

    Raises:
        ValueError: a reward belongs to none of the dialogues.
    """
    # A reward of another iteration's dialogue would go unnoticed in the means below.
    if strangers := sorted(rewards.keys() - {dialogue.id for dialogue in dialogues}):
        raise ValueError(f"rewards for dialogues that are not there: {', '.join(strangers[:3])}")
    complete = completed(dialogues)
    turns = [turn for dialogue in complete for turn in dialogue.turns]
    return [
        Metric("rollout/dialogues", len(dialogues), Reduction.sum),
        Metric("rollout/failed", len(dialogues) - len(complete), Reduction.sum),
        mean_metric("rollout/turns_per_dialogue", [len(dialogue.turns) for dialogue in complete]),
        mean_metric("rollout/reply_tokens", [len(turn.reply_ids) for turn in turns]),
        mean_metric("rollout/thinking_tokens", [turn.thinking_tokens for turn in turns]),
        mean_metric("rollout/well_formed_share", [turn.well_formed for turn in turns]),
        mean_metric("rollout/truncated_share", [turn.truncated for turn in turns]),
        Metric("rollout/distinct2", distinct_n(turn.reply for turn in turns), Reduction.last),
        Metric("rollout/thinking_distinct2", distinct_n(turn.thinking for turn in turns), Reduction.last),
        *(
            mean_metric(
                f"rollout/end_{reason.value}", [dialogue.end_reason is reason for dialogue in dialogues]
            )
            for reason in EndReason
        ),
        *_reward_metrics(complete, list(rewards.values())),
        *_judge_metrics(turns),
    ]


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of lower-cased words split at white space (after Li et al.,
    arXiv:1510.03055, section 5.1).

    No n-gram spans two texts. 0 where there is none at all. Larger corpora repeat more: compare only corpora
    of about one size.
    """
    grams = [gram for text in texts for gram in ngrams(text.lower().split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _reward_metrics(complete: list[Dialogue], rewards: list[float]) -> list[Metric]:
    # A reply that ended the dialogue unheard moved nothing.
    appraised = [turn for dialogue in complete for turn in dialogue.turns if turn.appraisal is not None]
    return [
        mean_metric("reward/mean", rewards),
        Metric("reward/std", statistics.pstdev(rewards) if rewards else 0.0, Reduction.last),
        mean_metric("reward/emotion_final", [dialogue.final_emotion for dialogue in complete]),
        mean_metric(
            "reward/emotion_change_per_turn", [turn.emotion_after - turn.emotion_before for turn in appraised]
        ),
        mean_metric("reward/success_share", [dialogue.final_emotion >= CEILING for dialogue in complete]),
        mean_metric("reward/failure_share", [dialogue.final_emotion < FLOOR for dialogue in complete]),
    ]


def _judge_metrics(turns: list[Turn]) -> list[Metric]:
    """Of replies that several judges appraised; none where no reply was."""
    judged = [
        turn.appraisal.features
        for turn in turns
        if turn.appraisal is not None and SPREAD in turn.appraisal.features
    ]
    if not judged:
        return []
    changes = sorted({name for features in judged for name in features if JUDGE_CHANGE.fullmatch(name)})
    return [
        mean_metric("judges/spread", [features[SPREAD] for features in judged]),
        mean_metric("judges/disagreement", [features[DISAGREEMENT] for features in judged]),
        *(
            mean_metric(f"judges/{name.removeprefix('judge_')}", [one[name] for one in judged if name in one])
            for name in changes
        ),
    ]
