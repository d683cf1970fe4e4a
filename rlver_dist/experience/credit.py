"""From kept dialogues to training samples, and from rewards, values and KL to the advantages of their trained
tokens.

A per-token quantity is a sequence of tensors, one `[n_i]` for each sample i over its trained tokens.
Everything is computed over whole dialogues, before samples are spread over optimizer steps and ranks: after
that the rows of a dialogue may be on different machines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlver_dist.algorithms.advantages import gae, grpo, whiten
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import RewardPlacement
from rlver_dist.dialogue import MAX_EMOTION, Dialogue
from rlver_dist.experience.packing import Columns, require_columns
from rlver_dist.experience.samples import TurnSample, to_samples


def samples_of(dialogues: Sequence[Dialogue]) -> list[TurnSample]:
    """The training samples of all dialogues, in the dialogues' order.

    Raises:
        ValueError: a turn cannot be trained on (`to_samples`).
    """
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
        dialogue = by_id[samples[indices[0]].dialogue_id]
        lengths = [samples[index].num_trained for index in indices]
        # In float32 equal rewards, paid in different steps, would sum to different last digits, and `grpo`
        # divides their distance by a deviation of almost 0.
        column = torch.zeros(sum(lengths), dtype=torch.float64)
        column[-1] = rewards[dialogue.id]
        if placement is RewardPlacement.turns:
            # The turns pay final - start emotion; what a rule or a guard took off is left for the end.
            column[-1] -= dialogue.final_emotion / MAX_EMOTION
            num_sampled = 0
            for turn in dialogue.turns:
                num_sampled += len(turn.reply_ids)
                column[max(num_sampled - 1, 0)] += (turn.emotion_after - turn.emotion_before) / MAX_EMOTION
        for index, numbers in zip(indices, _split(column, lengths), strict=True):
            paid[index] = numbers
    return paid


def segment_lengths(dialogues: Sequence[Dialogue], placement: RewardPlacement) -> dict[str, list[int]]:
    """How many trained tokens each segment of a dialogue has. A segment has one advantage, from comparing it
    with the segments of the same number in its group.

    Args:
        dialogues: those that are trained on.
        placement: with `end` a dialogue is one segment, with `turns` each of its turns is one.

    Returns:
        By dialogue id, the tokens of its segments in order; 0 for a turn without a token.
    """
    by_turn = {dialogue.id: [len(turn.reply_ids) for turn in dialogue.turns] for dialogue in dialogues}
    if placement is RewardPlacement.turns:
        return by_turn
    return {id: [sum(lengths)] for id, lengths in by_turn.items()}


def grpo_credit(
    samples: Sequence[TurnSample],
    algorithm: AlgorithmConfig,
    rewards: Columns,
    segments: dict[str, list[int]],
    kl_tokens: Columns | None,
    kl_coef: float,
) -> list[Tensor]:
    """GRPO: each segment's reward to go, compared over the group; its advantage is the same on all of its
    trained tokens.

    With one segment a dialogue that is GRPO as published; `grpo` says how single turns are compared.

    Args:
        samples: rows of whole groups.
        algorithm: group normalisation.
        rewards: `[n_i]` for each sample, see `token_rewards`.
        segments: trained tokens of each segment by dialogue id, see `segment_lengths`.
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
    rewards_to_go: list[Tensor] = []
    groups: list[str] = []
    numbers: list[int] = []
    lengths: list[int] = []
    for indices in dialogues:
        first = samples[indices[0]]
        start = 0
        # At each token: what is paid there and later in the dialogue.
        to_go = torch.cat([paid[index] for index in indices]).flip(0).cumsum(0).flip(0)
        for number, length in enumerate(segments[first.dialogue_id]):
            # A segment without a token has no place in the loss. It keeps its number, so that later turns are
            # still compared with those of the same number.
            if length:
                rewards_to_go.append(to_go[start])
                groups.append(first.group_id)
                numbers.append(number)
                lengths.append(length)
            start += length
    by_segment = grpo(torch.stack(rewards_to_go), groups, algorithm.normalize_by_std, numbers)
    order = [index for indices in dialogues for index in indices]
    # Segments and samples cut the same tokens differently: over the tokens, then back into samples.
    columns = _split(
        by_segment.repeat_interleave(torch.tensor(lengths)), [samples[index].num_trained for index in order]
    )
    return [column for _, column in sorted(zip(order, columns, strict=True), key=lambda pair: pair[0])]


def ppo_credit(
    samples: Sequence[TurnSample],
    algorithm: AlgorithmConfig,
    rewards: Columns,
    values: Columns,
    kl_tokens: Columns | None,
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
    _require_finite(samples, values=values)
    paid = _less_kl(samples, rewards, kl_tokens, kl_coef)
    advantages = [torch.empty(0)] * len(samples)
    returns = [torch.empty(0)] * len(samples)
    for indices in _dialogues(samples):
        lengths = [samples[index].num_trained for index in indices]
        reward = torch.cat([paid[index] for index in indices])
        value = torch.cat([values[index] for index in indices])
        by_token = gae(reward, value, algorithm.gamma, algorithm.gae_lambda)
        for by_sample, column in zip((advantages, returns), by_token, strict=True):
            for index, numbers in zip(indices, _split(column, lengths), strict=True):
                by_sample[index] = numbers
    if algorithm.whiten_advantages:
        # Over the whole iteration and not over an update or a rank, so that it does not depend on either.
        advantages = _split(whiten(torch.cat(advantages)), [len(numbers) for numbers in advantages])
    return advantages, returns


def dialogue_advantages(samples: Sequence[TurnSample], advantages: Columns) -> dict[str, float]:
    """Mean advantage over each dialogue's trained tokens, for the ledger.

    Args:
        samples: rows of whole dialogues.
        advantages: `[n_i]` for each sample.

    Returns:
        By dialogue id.

    Raises:
        ValueError: the advantages do not fit the samples or are not finite.
    """
    _require_finite(samples, advantages=advantages)
    return {
        samples[indices[0]].dialogue_id: torch.cat([advantages[index] for index in indices])
        .double()
        .mean()
        .item()
        for indices in _dialogues(samples)
    }


def _dialogues(samples: Sequence[TurnSample]) -> list[list[int]]:
    """Indices of each dialogue's samples, in turn order."""
    # Samples may come in any order; rewards to go and GAE run along a dialogue.
    members: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda index: samples[index].turn_index):
        members.setdefault(samples[index].dialogue_id, []).append(index)
    return list(members.values())


def _less_kl(
    samples: Sequence[TurnSample],
    rewards: Columns,
    kl_tokens: Columns | None,
    kl_coef: float,
) -> Columns:
    """Rewards with the KL taken off each token's own, where it is taken from the reward."""
    _require_finite(samples, rewards=rewards)
    if kl_tokens is None:
        return rewards
    _require_finite(samples, kl_tokens=kl_tokens)
    return [reward - kl_coef * tokens for reward, tokens in zip(rewards, kl_tokens, strict=True)]


def _split(column: Tensor, lengths: list[int]) -> list[Tensor]:
    """Cut into copies: a pickled view takes its whole storage along, which for views of one tensor grows with
    their number squared."""
    return [numbers.clone() for numbers in column.split(lengths)]


def _require_finite(samples: Sequence[TurnSample], **columns: Columns) -> None:
    """`require_columns` with finite numbers: one nan would spread over its group, or by whitening over all
    tokens, and there say nothing of where it came from."""
    require_columns(samples, **columns)
    for name, tensors in columns.items():
        for sample, numbers in zip(samples, tensors, strict=True):
            if not numbers.isfinite().all():
                raise ValueError(
                    f"{name} of dialogue {sample.dialogue_id}, turn {sample.turn_index}: not finite"
                )
