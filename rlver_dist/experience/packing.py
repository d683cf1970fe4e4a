"""One packed row: samples end to end, without padding, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlver_dist.experience.prefixes import Unit, context_length
from rlver_dist.experience.samples import TurnSample

Columns = Sequence[Tensor]
"""A number for each trained token: entry i is `[n_i]` over the trained tokens of sample i, in their order."""
DUMMY_LENGTH = 2
"""Tokens of the row that a rank without work runs: it has to take part in every collective operation of the
forward and backward pass."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Span:
    """Consecutive tokens of a row that attend the same context as a whole, and one another causally.

    Attributes:
        length: tokens of the span.
        context_start: index into the row of the first context token.
        context_length: tokens of the context; 0 where the span sees only itself.
    """

    length: int
    context_start: int = 0
    context_length: int = 0


@dataclass(kw_only=True, slots=True)
class PackedRow:
    """The tensors of one forward and backward pass.

    Attributes:
        indices: the samples that the row holds, in its order; none in a row that only keeps a rank in step.
        token_ids: `[T]` int64, all samples of the row end to end.
        position_ids: `[T]` int64, each token's place in its own sample.
        spans: which tokens attend to which; in order they cover the row.
        target_index: `[S]` int64, index into the row of each trained token, sample after sample.
        logit_index: `[S]` int64, index into the row of the token that predicts it.
    """

    indices: list[int]
    token_ids: Tensor
    position_ids: Tensor
    spans: list[Span]
    target_index: Tensor
    logit_index: Tensor

    def to(self, device: torch.device | str) -> PackedRow:
        """A copy of this row on `device`."""
        # Spans choose slices, so that their numbers are needed on the host.
        return PackedRow(
            indices=self.indices,
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            spans=self.spans,
            target_index=self.target_index.to(device),
            logit_index=self.logit_index.to(device),
        )


@dataclass(slots=True)
class _Layout:
    """A row as it grows: lists, since a tensor would be copied at each append."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    target_index: list[int] = field(default_factory=list)
    logit_index: list[int] = field(default_factory=list)

    def add_span(self, token_ids: list[int], context_start: int = 0, context_length: int = 0) -> None:
        """Append tokens whose positions go on from their context."""
        # Rotary embeddings see positions: a branch needs those that it would have in a row of its own.
        self.spans.append(
            Span(length=len(token_ids), context_start=context_start, context_length=context_length)
        )
        self.position_ids += range(context_length, context_length + len(token_ids))
        self.token_ids += token_ids

    def add_whole(self, sample: TurnSample) -> None:
        """Append a sample that sees itself alone."""
        if sample.loss_mask[0]:
            raise ValueError(
                f"dialogue {sample.dialogue_id}: the first token of a sample cannot be trained; nothing "
                f"predicts it"
            )
        start = len(self.token_ids)
        self.add_span(sample.token_ids)
        trained = [start + offset for offset, is_trained in enumerate(sample.loss_mask) if is_trained]
        self.target_index += trained
        # The logits at a token predict the next one.
        self.logit_index += [target - 1 for target in trained]

    def add_branches(self, shared_prefix: list[int], branches: Sequence[TurnSample]) -> None:
        """Append a shared prefix and the trained tokens of the samples that branch off it."""
        root = len(self.token_ids)
        self.add_span(shared_prefix)
        for sample in branches:
            start = len(self.token_ids)
            depth = context_length(sample)
            self.add_span(sample.token_ids[depth:], context_start=root, context_length=depth)
            self.target_index += range(start, len(self.token_ids))
            # The shared prefix predicts a branch's first token, the branch all others.
            self.logit_index += [root + depth - 1, *range(start, len(self.token_ids) - 1)]


def pack(samples: Sequence[TurnSample], units: Sequence[Unit]) -> PackedRow:
    """Lay `units` end to end, in that order.

    Args:
        samples: all samples of the iteration.
        units: those of the row; none gives a row that trains nothing, for a rank that has no work left.

    Returns:
        The row, `[T]` tokens of which `[S]` are trained, on the CPU.

    Raises:
        ValueError: a sample trains its first token.
    """
    layout = _Layout()
    for unit in units:
        chosen = [samples[index] for index in unit.indices]
        if unit.shared_prefix:
            layout.add_branches(unit.shared_prefix, chosen)
        else:
            for sample in chosen:
                layout.add_whole(sample)
    if not units:
        # Token 0 is in every vocabulary, and nothing of this row is trained.
        layout.add_span([0] * DUMMY_LENGTH)
    return PackedRow(
        indices=[index for unit in units for index in unit.indices],
        token_ids=torch.tensor(layout.token_ids, dtype=torch.int64),
        position_ids=torch.tensor(layout.position_ids, dtype=torch.int64),
        spans=layout.spans,
        target_index=torch.tensor(layout.target_index, dtype=torch.int64),
        logit_index=torch.tensor(layout.logit_index, dtype=torch.int64),
    )


def require_columns(samples: Sequence[TurnSample], **columns: Columns) -> None:
    """Check that columns fit the samples: one tensor a sample, one number a trained token.

    Args:
        samples: those that the columns belong to.
        columns: by the names that an error gives them, `[n_i]` for each sample i.

    Raises:
        ValueError: a column has too few or too many tensors, or one of them has another shape.
    """
    for name, tensors in columns.items():
        if len(tensors) != len(samples):
            raise ValueError(f"{name}: {len(tensors)} columns for {len(samples)} samples")
        for sample, numbers in zip(samples, tensors, strict=True):
            if numbers.shape != (sample.num_trained,):
                raise ValueError(
                    f"{name} of dialogue {sample.dialogue_id}, turn {sample.turn_index}: shape "
                    f"{tuple(numbers.shape)} does not fit {sample.num_trained} trained tokens"
                )


def column(values: Columns, row: PackedRow) -> Tensor:
    """The numbers of a row's trained tokens.

    Args:
        values: `[n_i]` for each sample of the iteration.
        row: `[S]` trained tokens of some of these samples.

    Returns:
        `[S]` float32 on the row's device, in the order of `row.target_index`.
    """
    chosen = [values[index] for index in row.indices]
    # `torch.cat` takes no empty list.
    return (
        torch.cat(chosen).to(row.token_ids.device, torch.float32)
        if chosen
        else torch.zeros(0, device=row.token_ids.device)
    )
