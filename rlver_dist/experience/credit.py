"""From kept dialogues to training samples and their dialogues' advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlver_dist.algorithms.advantages import grpo, kl_penalised_rewards
from rlver_dist.config import AlgorithmConfig
from rlver_dist.dialogue import Dialogue
from rlver_dist.experience.samples import TurnSample, to_samples


def samples_of(dialogues: Sequence[Dialogue], rewards: dict[str, float]) -> list[TurnSample]:
    """Rows of all dialogues, in the dialogues' order; `rewards` is keyed by dialogue id."""
    return [sample for dialogue in dialogues for sample in to_samples(dialogue, rewards[dialogue.id])]


def assign_credit(samples: list[TurnSample], algorithm: AlgorithmConfig, kl_sums: Sequence[float] | None = None) -> dict[str, float]:
    """GRPO advantages over the dialogues of each group, by dialogue id; each holds for all of its dialogue's samples.

    Args:
        samples: rows of whole groups.
        algorithm: group normalisation and the KL's weight.
        kl_sums: per sample, the summed KL to the reference in nats, where the KL is taken from the reward.
    """
    order = list(dict.fromkeys(sample.dialogue_id for sample in samples))
    rewards, groups, kl = {}, {}, dict.fromkeys(order, 0.0)
    for index, sample in enumerate(samples):
        rewards[sample.dialogue_id] = sample.reward
        groups[sample.dialogue_id] = sample.group_id
        kl[sample.dialogue_id] += kl_sums[index] if kl_sums is not None else 0.0
    per_dialogue = torch.tensor([rewards[key] for key in order])
    if kl_sums is not None:
        per_dialogue = kl_penalised_rewards(per_dialogue, torch.tensor([kl[key] for key in order]), algorithm.kl_coef)
    advantages = grpo(per_dialogue, [groups[key] for key in order], algorithm.normalize_by_std)
    return dict(zip(order, advantages.tolist(), strict=True))
