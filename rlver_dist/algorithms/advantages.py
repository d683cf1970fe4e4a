"""Advantages of whole dialogues from their rewards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from rlver_dist.algorithms.reduce import require_same_shape

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, as in the original (RLVER, verl/trainer/ppo/core_algos.py)."""


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


def kl_penalised_rewards(rewards: Tensor, kl_sums: Tensor, coef: float) -> Tensor:
    """KL in the reward: reward - coef * KL of the whole dialogue (InstructGPT, arXiv:2203.02155, eq. 2).

    Args:
        rewards: `[N]` one reward a dialogue.
        kl_sums: `[N]` sum of the per-token KL estimates over the dialogue's trained tokens, nats.
        coef: reward per nat.

    Returns:
        `[N]`.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(rewards=rewards, kl_sums=kl_sums)
    return rewards - coef * kl_sums
