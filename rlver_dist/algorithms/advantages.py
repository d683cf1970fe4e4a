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


def grpo(
    rewards: Tensor, group_ids: Sequence[Hashable], normalize_by_std: bool, turns: Sequence[int] | None = None
) -> Tensor:
    """Group-relative advantages: (reward - group mean) / (group std + 1e-6), over the dialogues of a group.

    GRPO, arXiv:2402.03300, section 4.1.2. The paper does not say which standard deviation; this is the sample
    one (divisor n - 1), as in the original's and verl's code. Without `normalize_by_std` the rewards are only
    centred (Dr. GRPO, arXiv:2503.20783).

    With `turns` an entry is one turn of a dialogue, and its reward is the reward to go. It is centred among
    the group's turns of the same number. Earlier turns decided which dialogues reach that number, so no turn
    is judged by how long its dialogue lasted; a sum of normalised later rewards (section 4.1.3) would judge
    it by that. All turns of a group are divided by one standard deviation, pooled over its turn numbers
    (divisor n - numbers), so that a turn number at which rewards differ more keeps larger advantages.

    Without `turns` an entry is one dialogue. Pass each dialogue once: an entry for each of its rows would
    weigh long dialogues more in the group's mean.

    Args:
        rewards: `[N]` one reward an entry.
        group_ids: `[N]` which group each belongs to; order and values are free.
        normalize_by_std: divide by the standard deviation.
        turns: `[N]` each entry's turn number; None: an entry is a whole dialogue.

    Returns:
        `[N]` float32, in the order of `rewards`; 0 throughout a group of equal rewards, and for a turn that
            no other dialogue reached.

    Raises:
        ValueError: lengths differ, or a group has a single entry, which has nothing to be compared with.
    """
    numbers = [0] * len(group_ids) if turns is None else turns
    if not rewards.shape == (len(group_ids),) == (len(numbers),):
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not fit {len(group_ids)} group ids and "
            f"{len(numbers)} turns"
        )
    groups: dict[Hashable, dict[int, list[int]]] = {}
    for position, (group_id, number) in enumerate(zip(group_ids, numbers, strict=True)):
        groups.setdefault(group_id, {}).setdefault(number, []).append(position)
    # In float32 the mean of equal rewards is off by a last digit, which division by 1e-6 turns into an
    # advantage of 0.03.
    advantages = rewards.to(torch.float64, copy=True)
    for group_id, compared in groups.items():
        members = [position for positions in compared.values() for position in positions]
        if len(members) < 2:
            raise ValueError(f"group {group_id!r} has one dialogue; GRPO compares at least two")
        for positions in compared.values():
            advantages[positions] -= advantages[positions].mean()
        if normalize_by_std:
            # Each turn number's mean costs a degree of freedom. Where none is left, all distances are 0.
            freedom = max(len(members) - len(compared), 1)
            advantages[members] /= (advantages[members].square().sum() / freedom).sqrt() + STD_EPSILON
    return advantages.float()


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over one dialogue's trained tokens, in turn order.

    With delta_t = reward_t + gamma * value_{t+1} - value_t, advantage_t = sum over k of (gamma * lam)^k *
    delta_{t+k} (arXiv:1506.02438, eq. 16). A step is a trained token: one turn's last token is followed by
    the next turn's first, whatever the user said in between, so that no advantage depends on the number of
    the user's tokens. After the last token the dialogue is over and worth 0.

    Args:
        rewards: `[T]` reward on each trained token.
        values: `[T]` value of the state before each trained token.
        gamma: discount per trained token, 0 to 1.
        lam: 0 (one step) to 1 (discounted sum of rewards - value).

    Returns:
        Advantages `[T]` and returns `[T]` = advantages + values, what the critic learns; float32, summed in
            float64.

    Raises:
        ValueError: shapes differ or are not flat.
    """
    require_same_shape(rewards=rewards, values=values)
    if rewards.dim() != 1:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)}: use one number a trained token of one dialogue"
        )
    # Python numbers: a loop that reads and writes tensors one entry at a time is many times slower.
    reward_list = rewards.tolist()
    value_list = values.tolist()
    advantages = [0.0] * len(reward_list)
    next_value = next_advantage = 0.0
    # Backwards, since each advantage contains the next one.
    for step in range(len(reward_list) - 1, -1, -1):
        delta = reward_list[step] + gamma * next_value - value_list[step]
        next_advantage = advantages[step] = delta + gamma * lam * next_advantage
        next_value = value_list[step]
    summed = torch.tensor(advantages, dtype=torch.float64)
    return summed.float(), (summed + torch.tensor(value_list, dtype=torch.float64)).float()


def whiten(values: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1: (value - mean) / sqrt(variance + 1e-8), as the
    original does.

    The variance's divisor is n, so that a single value gives 0. The 1e-8 keeps standard deviations far below
    1e-4 small.

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
