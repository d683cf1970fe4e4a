"""A rank's share of the samples as packed rows, and numbers of their trained tokens back from all ranks."""

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


def share_rows(
    samples: Sequence[TurnSample],
    part: Sequence[int],
    *,
    rank: int,
    world_size: int,
    max_tokens: int,
    share: bool,
    device: torch.device | str,
) -> list[PackedRow]:
    """This rank's packed rows of the samples at `part`, on `device`; as many on every rank, short ranks end
    with empty ones.

    Args:
        samples: all samples, the same on every rank.
        part: which of them; samples of one dialogue share contexts where they stand next to each other.
        rank: 0 to world_size - 1.
        world_size: ranks that share the work.
        max_tokens: budget of a row.
        share: compute contexts that a dialogue's samples share once.
        device: where the rows' tensors go.
    """
    units = make_units(samples, part, share_prefixes=share, max_tokens=max_tokens)
    plan = plan_micro_batches([unit.num_tokens for unit in units], world_size, max_tokens)
    return [pack(samples, [units[index] for index in chosen]).to(device) for chosen in plan[rank]]


def num_tokens(rows: Sequence[PackedRow]) -> int:
    """Tokens of all of `rows`."""
    return sum(len(row.token_ids) for row in rows)


def score_row(
    forward: Callable[..., Any],
    row: PackedRow,
    temperature: float,
    measure: Measure = LogprobAndEntropy.apply,
) -> Any:
    """What `PolicyModel.forward` gives for the row's trained tokens, by default log-probs `[S]` and entropies
    `[S]` in nats.

    Args:
        forward: a `PolicyModel`, or an engine around one.
        row: see `PackedRow`.
        temperature: divides the logits.
        measure: what is computed of each trained token's logits.
    """
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
    per_sample = columns.split(counts)
    for row, numbers in zip(rows, values, strict=True):
        lengths = [counts[index] for index in row.indices]
        for index, part in zip(row.indices, numbers.detach().float().split(lengths), strict=True):
            per_sample[index].copy_(part)
    torch.distributed.all_reduce(columns)
    # A view would be pickled with the numbers of all samples.
    return [column.clone() for column in columns.cpu().split(counts)]
