"""Which samples go into which optimizer step, rank and micro-batch. Deterministic: equal input gives an equal
plan."""

from __future__ import annotations

from collections.abc import Sequence


def split_updates(group_ids: Sequence[str], num_updates: int) -> list[list[int]]:
    """Indices of the samples of each optimizer step, along whole groups.

    Groups keep their order of first appearance and the steps' numbers of groups differ by at most one.
    Lengths play no part, so that a step is not a selection of short or long dialogues.

    Args:
        group_ids: group of each sample.
        num_updates: wanted steps; fewer come back where there are fewer groups, none for no sample.

    Raises:
        ValueError: `num_updates` is not positive.
    """
    if num_updates < 1:
        raise ValueError(f"num_updates={num_updates}: use at least 1")
    members: dict[str, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    num_parts = min(num_updates, len(members))
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for position, indices in enumerate(members.values()):
        parts[position * num_parts // len(members)] += indices
    return [sorted(part) for part in parts]


def plan_micro_batches(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Spread units (samples, or several that share a shared prefix) over ranks by tokens, and each rank's
    over packed rows.

    Every rank gets the same number of micro-batches, since a rank with fewer would leave the others waiting
    in a collective; short ranks get empty lists at the end. A micro-batch holds at most `max_tokens`, except
    that a longer unit stands alone.

    Args:
        lengths: tokens of each unit.
        num_ranks: data-parallel ranks.
        max_tokens: budget of a packed row.

    Returns:
        `[rank][micro_batch]` lists of unit indices, each index exactly once; ranks' token sums differ by at
            most the longest unit. No unit gives no micro-batch on every rank.

    Raises:
        ValueError: a length, `num_ranks` or `max_tokens` is not positive.
    """
    if num_ranks < 1 or max_tokens < 1 or any(length < 1 for length in lengths):
        raise ValueError(f"num_ranks={num_ranks}, max_tokens={max_tokens} and all lengths must be positive")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan = [_fill(share, lengths, max_tokens) for share in _spread(longest_first, lengths, num_ranks)]
    num_micro_batches = max(len(micro_batches) for micro_batches in plan)
    return [
        micro_batches + [[] for _ in range(num_micro_batches - len(micro_batches))] for micro_batches in plan
    ]


def _spread(longest_first: list[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Longest processing time first: each unit to the rank with the fewest tokens so far (Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return shares


def _fill(longest_first: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing bin packing, fullest row first, so that ranks run rows of like size at the same
    time."""
    rows: list[list[int]] = []
    loads: list[int] = []
    for index in longest_first:
        row = next((row for row, load in enumerate(loads) if load + lengths[index] <= max_tokens), len(rows))
        if row == len(rows):
            rows.append([])
            loads.append(0)
        rows[row].append(index)
        loads[row] += lengths[index]
    fullest_first = sorted(range(len(rows)), key=lambda row: (-loads[row], row))
    return [sorted(rows[row]) for row in fullest_first]
