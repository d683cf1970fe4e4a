"""Advantages: of whole dialogues against their group, and of single tokens against a critic's values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rlver_dist.algorithms.reduce import require_same_shape

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as in the original (RLVER, verl/trainer/ppo/core_algos.py)."""

VARIANCE_EPSILON = 1e-8
"""Added to the variance in whitening, as in the original (RLVER, verl/utils/torch_functional.py)."""


def grpo(rewards: Tensor, group_ids: Sequence[Hashable] | Tensor, normalize_by_std: bool) -> Tensor:
    """Group-relative advantages: (reward - group mean) / (group std + 1e-6), over the dialogues of a group.

    GRPO, arXiv:2402.03300, section 4.1.2. The paper does not say which standard deviation; this is the sample one (divisor
    n - 1), as in the original's and verl's code. Without `normalize_by_std` the rewards are only centred (Dr. GRPO,
    arXiv:2503.20783). One entry is one dialogue, never a turn: rows of turns would weigh long dialogues more.

    Args:
        rewards: `[N]` one reward a dialogue.
        group_ids: `[N]` which group each dialogue belongs to; order and values are free.
        normalize_by_std: divide by the standard deviation.

    Returns:
        `[N]` float32, in the order of `rewards`; 0 throughout a group of equal rewards.

    Raises:
        ValueError: lengths differ, or a group has a single dialogue, which has nothing to be compared with.
    """
    ids = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
    if rewards.shape != (len(ids),):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not fit {len(ids)} group ids")
    members: dict[Hashable, list[int]] = {}
    for position, group_id in enumerate(ids):
        members.setdefault(group_id, []).append(position)
    advantages = torch.empty(len(ids), dtype=torch.float64)
    for group_id, positions in members.items():
        if len(positions) < 2:
            raise ValueError(f"group {group_id!r} has one dialogue; GRPO compares at least two")
        # In float32 the mean of equal rewards is off by a last digit, which division by 1e-6 turns into an advantage of 0.03.
        group = rewards[positions].double()
        centred = group - group.mean()
        advantages[positions] = centred / (group.std(correction=1) + STD_EPSILON) if normalize_by_std else centred
    return advantages.float()


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over one dialogue's trained tokens, in turn order.

    With delta_t = reward_t + gamma * value_{t+1} - value_t, advantage_t = sum over k of (gamma * lam)^k * delta_{t+k}
    (arXiv:1506.02438, eq. 16). A step is a trained token: one turn's last token is followed by the next turn's first, whatever
    the user said in between, so that no advantage depends on the number of the user's tokens. After the last token the dialogue
    is over and worth 0.

    Args:
        rewards: `[T]` reward on each trained token.
        values: `[T]` value of the state before each trained token.
        gamma: discount per trained token, 0 to 1.
        lam: 0 (one step) to 1 (discounted sum of rewards - value).

    Returns:
        Advantages `[T]` and returns `[T]` = advantages + values, what the critic learns; float32, summed in float64.

    Raises:
        ValueError: shapes differ or are not flat.
    """
    require_same_shape(rewards=rewards, values=values)
    if rewards.dim() != 1:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: use one number a trained token of one dialogue")
    reward_list, value_list = rewards.tolist(), values.tolist()
    advantages = [0.0] * len(reward_list)
    next_value = next_advantage = 0.0
    for step in range(len(reward_list) - 1, -1, -1):
        delta = reward_list[step] + gamma * next_value - value_list[step]
        next_advantage = advantages[step] = delta + gamma * lam * next_advantage
        next_value = value_list[step]
    summed = torch.tensor(advantages, dtype=torch.float64)
    return summed.float(), (summed + torch.tensor(value_list, dtype=torch.float64)).float()


def whiten(values: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1: (value - mean) / sqrt(variance + 1e-8), as the original does.

    The variance's divisor is n, so that a single value gives 0. Spreads far below 1e-4 are not blown up to 1.

    Args:
        values: `[N]` all trained tokens of an iteration.

    Returns:
        `[N]` float32, computed in float64.

    Raises:
        ValueError: no values, or not flat.
    """
    if values.dim() != 1 or not len(values):
        raise ValueError(f"values of shape {tuple(values.shape)}: use a flat tensor of at least one number")
    centred = values.double() - values.double().mean()
    return (centred / (centred.square().mean() + VARIANCE_EPSILON).sqrt()).float()
