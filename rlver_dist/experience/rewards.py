"""What a dialogue is paid, and which dialogues are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rlver_dist.config.algorithm import EndRewardConfig
from rlver_dist.config.enums import EndReward
from rlver_dist.dialogue import MAX_EMOTION, Dialogue, EndReason


def dialogue_reward(dialogue: Dialogue, end_rewards: EndRewardConfig) -> float:
    """Reward of a finished dialogue, 0 to 1: final emotion / 100 (RLVER,
    verl/environments/url_environment.py).

    Where the policy itself ended the dialogue, the rule for that end in `end_rewards` decides between this
    and 0.

    Raises:
        ValueError: an infrastructure failure, which has no reward.
    """
    if dialogue.end_reason is EndReason.INFRASTRUCTURE:
        raise ValueError(
            f"dialogue {dialogue.id}: an infrastructure failure is never scored ({dialogue.error})"
        )
    rules = {
        EndReason.MALFORMED: end_rewards.malformed,
        EndReason.OVER_LONG: end_rewards.over_long,
        EndReason.CONTEXT_OVERFLOW: end_rewards.context_overflow,
    }
    # Ends that the user decides have no rule: there the emotion has already said what they are worth.
    if rules.get(dialogue.end_reason) is EndReward.zero:
        return 0.0
    return dialogue.final_emotion / MAX_EMOTION


@dataclass(kw_only=True, slots=True)
class Selection:
    """Which dialogues of an iteration are trained on.

    Attributes:
        kept: sorted by id, so that training does not depend on the order in which dialogues finished.
        num_failed: infrastructure failures and dialogues without a sampled token.
        num_dropped_groups: groups of which failures left some dialogues, but too few.
        num_dropped: dialogues of those groups that could have been trained on.
    """

    kept: list[Dialogue]
    num_failed: int
    num_dropped_groups: int
    num_dropped: int


def select_trainable(dialogues: Iterable[Dialogue], min_group: int) -> Selection:
    """Exclude what cannot be trained on: failed dialogues, then those of groups that are too small.

    Nothing else in the package leaves dialogues out of training.

    Args:
        dialogues: all dialogues of an iteration, in any order.
        min_group: fewest sound dialogues of a group that is kept: 2 where they are compared with each other
            (GRPO), 1 where a critic judges each alone (PPO).

    Returns:
        The dialogues to train on, and how many were excluded for which reason.
    """
    finished = sorted(dialogues, key=lambda dialogue: dialogue.id)
    sound = [dialogue for dialogue in finished if _is_sound(dialogue)]
    sizes = Counter(dialogue.group_id for dialogue in sound)
    kept = [dialogue for dialogue in sound if sizes[dialogue.group_id] >= min_group]
    return Selection(
        kept=kept,
        num_failed=len(finished) - len(sound),
        num_dropped_groups=sum(size < min_group for size in sizes.values()),
        num_dropped=len(sound) - len(kept),
    )


def _is_sound(dialogue: Dialogue) -> bool:
    # Without a sampled token there is nothing to train, and a reward that the policy did not earn would shift
    # its group's mean.
    return dialogue.end_reason is not EndReason.INFRASTRUCTURE and any(
        turn.reply_ids for turn in dialogue.turns
    )
