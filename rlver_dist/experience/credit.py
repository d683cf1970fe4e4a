"""From kept dialogues to training samples, and from rewards, values and KL to the advantages of their trained
tokens.

A per-token quantity is a sequence of float32 tensors, one `[n_i]` for each sample i over its trained tokens.
Everything is computed over whole dialogues, before samples are spread over optimizer steps and ranks: only
here are all rows of a dialogue together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlver_dist.algorithms.advantages import gae, grpo, whiten
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import RewardPlacement
from rlver_dist.dialogue import MAX_EMOTION, Dialogue
from rlver_dist.experience.samples import TurnSample, to_samples


def samples_of(dialogues: Sequence[Dialogue]) -> list[TurnSample]:
    """Rows of all dialogues, in the dialogues' order."""
    return [sample for dialogue in dialogues for sample in to_samples(dialogue)]


def token_rewards(
    samples: Sequence[TurnSample],
    dialogues: Sequence[Dialogue],
    rewards: dict[str, float],
    placement: RewardPlacement,
) -> list[Tensor]:
    """Each dialogue's reward on the trained tokens that are paid: its last one, or the last one of each turn.

    Args:
        samples: all rows of `dialogues`.
        dialogues: those that are trained on.
        rewards: keyed by dialogue id.
        placement: `end` pays the reward at once; `turns` pays each turn its change of emotion / 100, and the
            last one also what the reward differs from the final emotion by. A turn without tokens is paid on
            the token before it.

    Returns:
        `[n_i]` float64 for each sample; over a dialogue they sum to its reward, with `turns` to its reward -
            start emotion / 100.
    """
    by_id = {dialogue.id: dialogue for dialogue in dialogues}
    paid = [torch.empty(0)] * len(samples)
    for indices in _dialogues(samples):
        dialogue, lengths = (
            by_id[samples[indices[0]].dialogue_id],
            [samples[index].num_trained for index in indices],
        )
        column = torch.zeros(sum(lengths), dtype=torch.float64)
        column[-1] = rewards[dialogue.id]
        if placement is RewardPlacement.turns:
            column[-1] -= dialogue.final_emotion / MAX_EMOTION
            said = 0
            for turn in dialogue.turns:
                said += len(turn.reply_ids)
                column[max(said - 1, 0)] += (turn.emotion_after - turn.emotion_before) / MAX_EMOTION
        for index, part in zip(indices, _split(column, lengths), strict=True):
            paid[index] = part
    return paid


def compared_parts(dialogues: Sequence[Dialogue], placement: RewardPlacement) -> dict[str, list[int]]:
    """By dialogue id, the trained tokens of each part that is compared on its own: the dialogue, or with
    `turns` each of its turns."""
    lengths = {dialogue.id: [len(turn.reply_ids) for turn in dialogue.turns] for dialogue in dialogues}
    return (
        lengths
        if placement is RewardPlacement.turns
        else {name: [sum(turns)] for name, turns in lengths.items()}
    )


def grpo_credit(
    samples: Sequence[TurnSample],
    algorithm: AlgorithmConfig,
    rewards: Sequence[Tensor],
    parts: dict[str, list[int]],
    kl_tokens: Sequence[Tensor] | None,
    kl_coef: float,
) -> list[Tensor]:
    """GRPO: each part's reward to go, compared over the group; its advantage is the same on all of its
    trained tokens.

    With one part a dialogue that is GRPO as published; for a part a turn see `grpo`.

    Args:
        samples: rows of whole groups.
        algorithm: group normalisation.
        rewards: `[n_i]` for each sample, see `token_rewards`.
        parts: see `compared_parts`.
        kl_tokens: `[n_i]` for each sample, KL to the reference in nats, where the KL is taken from the
            reward: kl_coef times it off each token's own reward (InstructGPT, arXiv:2203.02155, eq. 2). None:
            not taken.
        kl_coef: present weight of the KL, reward per nat.

    Returns:
        `[n_i]` float32 for each sample.

    Raises:
        ValueError: rewards or KL do not fit the samples or are not finite, or a group has a single dialogue.
    """
    paid = _less_kl(samples, rewards, kl_tokens, kl_coef)
    dialogues = _dialogues(samples)
    to_go, groups, numbers, lengths = [], [], [], []
    for indices in dialogues:
        first, end = samples[indices[0]], 0
        left = torch.cat([paid[index] for index in indices]).flip(0).cumsum(0).flip(0)
        for number, length in enumerate(parts[first.dialogue_id]):
            if length:
                to_go.append(left[end])
                groups.append(first.group_id)
                numbers.append(number)
                lengths.append(length)
            end += length
    by_part = grpo(torch.stack(to_go), groups, algorithm.normalize_by_std, numbers)
    order = [index for indices in dialogues for index in indices]
    columns = _split(
        by_part.repeat_interleave(torch.tensor(lengths)), [samples[index].num_trained for index in order]
    )
    return [column for _, column in sorted(zip(order, columns, strict=True), key=lambda pair: pair[0])]


def ppo_credit(
    samples: Sequence[TurnSample],
    algorithm: AlgorithmConfig,
    rewards: Sequence[Tensor],
    values: Sequence[Tensor],
    kl_tokens: Sequence[Tensor] | None,
    kl_coef: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """PPO: generalised advantage estimation along each dialogue's trained tokens, over all of its turns.

    User tokens, and history that several rows repeat, take no part.

    Args:
        samples: rows of whole dialogues.
        algorithm: discount, lambda, and whether advantages are whitened over all trained tokens.
        rewards: `[n_i]` for each sample, see `token_rewards`.
        values: `[n_i]` for each sample, the critic's value of the state before each trained token.
        kl_tokens: `[n_i]` for each sample, KL to the reference in nats, where the KL is taken from the
            reward: kl_coef times it off each token's own reward (arXiv:1909.08593, eq. 2). None: not taken.
        kl_coef: present weight of the KL, reward per nat.

    Returns:
        Advantages and returns, `[n_i]` float32 for each sample; returns are never whitened.

    Raises:
        ValueError: there are no samples, or rewards, values or KL do not fit them or are not finite.
    """
    _require_fit(samples, "values", values)
    paid = _less_kl(samples, rewards, kl_tokens, kl_coef)
    advantages, returns = [torch.empty(0)] * len(samples), [torch.empty(0)] * len(samples)
    for indices in _dialogues(samples):
        lengths = [samples[index].num_trained for index in indices]
        reward, value = (torch.cat([column[index] for index in indices]) for column in (paid, values))
        columns = gae(reward, value, algorithm.gamma, algorithm.gae_lambda)
        for spread, column in zip((advantages, returns), columns, strict=True):
            for index, part in zip(indices, _split(column, lengths), strict=True):
                spread[index] = part
    if algorithm.whiten_advantages:
        advantages = _split(whiten(torch.cat(advantages)), [len(part) for part in advantages])
    return advantages, returns


def dialogue_advantages(samples: Sequence[TurnSample], advantages: Sequence[Tensor]) -> dict[str, float]:
    """Mean advantage over each dialogue's trained tokens, by dialogue id; `advantages` is `[n_i]` for each
    sample."""
    _require_fit(samples, "advantages", advantages)
    return {
        samples[indices[0]].dialogue_id: torch.cat([advantages[index] for index in indices])
        .double()
        .mean()
        .item()
        for indices in _dialogues(samples)
    }


def _dialogues(samples: Sequence[TurnSample]) -> list[list[int]]:
    """Indices of each dialogue's samples, in turn order."""
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda index: samples[index].turn_index):
        members.setdefault(samples[index].dialogue_id, []).append(index)
    return list(members.values())


def _less_kl(
    samples: Sequence[TurnSample],
    rewards: Sequence[Tensor],
    kl_tokens: Sequence[Tensor] | None,
    kl_coef: float,
) -> Sequence[Tensor]:
    _require_fit(samples, "rewards", rewards)
    if kl_tokens is None:
        return rewards
    _require_fit(samples, "KL", kl_tokens)
    return [reward - kl_coef * tokens for reward, tokens in zip(rewards, kl_tokens, strict=True)]


def _split(column: Tensor, lengths: list[int]) -> list[Tensor]:
    """Cut into copies: a pickled view takes its whole storage along, which for views of one tensor grows with
    their number squared."""
    return [part.clone() for part in column.split(lengths)]


def _require_fit(samples: Sequence[TurnSample], name: str, columns: Sequence[Tensor]) -> None:
    if len(columns) != len(samples):
        raise ValueError(f"{name}: {len(columns)} columns for {len(samples)} samples")
    for sample, column in zip(samples, columns, strict=True):
        where = f"{name} of dialogue {sample.dialogue_id}, turn {sample.turn_index}"
        if column.shape != (sample.num_trained,):
            raise ValueError(
                f"{where}: shape {tuple(column.shape)} does not fit {sample.num_trained} trained tokens"
            )
        if not column.isfinite().all():
            raise ValueError(f"{where}: not finite")
