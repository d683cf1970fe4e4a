"""One packed row: several samples end to end, without padding, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlver_dist.experience.samples import TurnSample

DUMMY_LENGTH = 2
"""Tokens of the row that a rank without work runs: the shortest that has a token with a predecessor."""


@dataclass(kw_only=True, slots=True)
class PackedRow:
    """The tensors of one forward and backward pass; a segment is one sample, and attention must not cross segments.

    Attributes:
        token_ids: `[T]` int64.
        position_ids: `[T]` int64, from 0 in each segment.
        lengths: tokens of each segment, summing to T.
        loss_mask: `[T]` bool, True where the token itself is a trained target, predicted at the position before it; False at
            each segment's first token.
        rollout_logprobs: `[T]` float32, log-prob of the token itself as sampled, nats; 0 outside the mask.
        advantages: `[T]` float32; 0 outside the mask.
    """

    token_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    loss_mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor

    def to(self, device: torch.device | str) -> PackedRow:
        """A copy of this row on `device`."""
        return PackedRow(
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            lengths=self.lengths,
            loss_mask=self.loss_mask.to(device),
            rollout_logprobs=self.rollout_logprobs.to(device),
            advantages=self.advantages.to(device),
        )


def pack(samples: Sequence[TurnSample], advantages: Sequence[float], indices: Sequence[int]) -> PackedRow:
    """Lay the samples at `indices` end to end, in that order.

    Args:
        samples: all samples of the iteration.
        advantages: one advantage per sample, put on each of its trained tokens.
        indices: which samples; none gives a row of two tokens that trains nothing, for a rank that has no work left.

    Raises:
        ValueError: advantages do not fit the samples, or a sample trains its first token.
    """
    if len(advantages) != len(samples):
        raise ValueError(f"{len(advantages)} advantages for {len(samples)} samples")
    chosen = [samples[index] for index in indices]
    first_trained = next((sample.dialogue_id for sample in chosen if sample.loss_mask[0]), None)
    if first_trained is not None:
        raise ValueError(f"dialogue {first_trained}: the first token of a sample cannot be trained; nothing predicts it")
    if not chosen:
        return _dummy_row()
    lengths = [len(sample.token_ids) for sample in chosen]
    loss_mask = torch.cat([torch.tensor(sample.loss_mask, dtype=torch.bool) for sample in chosen])
    spread = torch.tensor([advantages[index] for index in indices], dtype=torch.float32).repeat_interleave(torch.tensor(lengths))
    return PackedRow(
        token_ids=torch.cat([torch.tensor(sample.token_ids, dtype=torch.int64) for sample in chosen]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        lengths=lengths,
        loss_mask=loss_mask,
        rollout_logprobs=torch.cat([torch.tensor(sample.rollout_logprobs, dtype=torch.float32) for sample in chosen]),
        advantages=torch.where(loss_mask, spread, 0.0),
    )


def _dummy_row() -> PackedRow:
    return PackedRow(
        token_ids=torch.zeros(DUMMY_LENGTH, dtype=torch.int64),
        position_ids=torch.arange(DUMMY_LENGTH),
        lengths=[DUMMY_LENGTH],
        loss_mask=torch.zeros(DUMMY_LENGTH, dtype=torch.bool),
        rollout_logprobs=torch.zeros(DUMMY_LENGTH),
        advantages=torch.zeros(DUMMY_LENGTH),
    )
