"""A rank's samples as packed rows, and numbers of their trained tokens back from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlver_dist.experience.balance import plan_micro_batches
from rlver_dist.experience.packing import PackedRow, pack
from rlver_dist.experience.prefixes import make_units
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner.scoring import LogprobAndEntropy, Measure

Forward = Callable[..., Any]
"""`PolicyModel.forward`: a `PolicyModel`, or an engine around one. Its result is what the measure gives."""


def rank_rows(
    samples: Sequence[TurnSample],
    indices: Sequence[int],
    *,
    rank: int,
    world_size: int,
    max_tokens: int,
    share_prefixes: bool,
    device: torch.device | str,
) -> list[PackedRow]:
    """One rank's packed rows of the samples at `indices`; as many on every rank, short ranks end with empty
    ones.

    Args:
        samples: all samples, the same on every rank.
        indices: which of them; samples of one dialogue share contexts where they stand next to each other.
        rank: 0 to world_size - 1.
        world_size: ranks that divide the work among them.
        max_tokens: budget of a row.
        share_prefixes: compute contexts that a dialogue's samples have in common once.
        device: where the rows' tensors go.

    Returns:
        The rows, each of tensors `[T]`, T at most `max_tokens` unless a single unit is longer.
    """
    units = make_units(samples, indices, share_prefixes=share_prefixes, max_tokens=max_tokens)
    # Every rank makes the whole plan and takes its line of it: no rank has to tell another what to do.
    plan = plan_micro_batches([unit.num_tokens for unit in units], world_size, max_tokens)
    return [pack(samples, [units[index] for index in chosen]).to(device) for chosen in plan[rank]]


def num_tokens(rows: Sequence[PackedRow]) -> int:
    """Tokens of all of `rows`."""
    return sum(len(row.token_ids) for row in rows)


def score_row(forward: Forward, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the row's trained tokens.

    Args:
        forward: a `PolicyModel`, or an engine around one.
        row: a packed row.
        temperature: divides the logits.

    Returns:
        Log-probs `[S]` and entropies `[S]`, float32, in nats.
    """
    return _measured(forward, row, temperature, LogprobAndEntropy.apply)


def measure_row(forward: Forward, row: PackedRow, temperature: float, measure: Measure) -> Tensor:
    """What `measure` makes of the logits of the row's trained tokens.

    Args:
        forward: a `PolicyModel`, or an engine around one.
        row: a packed row.
        temperature: divides the logits.
        measure: gives one number for each trained token.

    Returns:
        `[S]` float32.
    """
    return _measured(forward, row, temperature, measure)


def _measured(forward: Forward, row: PackedRow, temperature: float, measure: Measure) -> Any:
    return forward(
        row.token_ids, row.position_ids, row.spans, row.logit_index, row.target_index, temperature, measure
    )


def collect_columns(
    samples: Sequence[TurnSample],
    rows: Sequence[PackedRow],
    values: Sequence[Tensor],
    device: torch.device | str,
) -> list[Tensor]:
    """Put the ranks' numbers of trained tokens together; collective.

    Args:
        samples: all samples, the same on every rank.
        rows: this rank's rows; each sample is in one row of one rank.
        values: `[S]` for each row, at its trained tokens.
        device: the rank's own.

    Returns:
        `[n_i]` float32 on the CPU for each sample, the same on every rank; 0 where a sample is in no row.
    """
    counts = [sample.num_trained for sample in samples]
    columns = torch.zeros(sum(counts), dtype=torch.float32, device=device)
    # Views of one buffer, so that a single all-reduce carries all samples. Each of them is written by one
    # rank and 0 on the others: the sum is the value itself, to the last bit.
    per_sample = columns.split(counts)
    for row, numbers in zip(rows, values, strict=True):
        lengths = [counts[index] for index in row.indices]
        for index, column in zip(row.indices, numbers.detach().float().split(lengths), strict=True):
            per_sample[index].copy_(column)
    torch.distributed.all_reduce(columns)
    # A view would be pickled with the numbers of all samples.
    return [column.clone() for column in columns.cpu().split(counts)]
