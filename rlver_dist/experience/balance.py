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

    Returns:
        `[update]` ascending lists of sample indices, each index exactly once.

    Raises:
        ValueError: `num_updates` is not positive.
    """
    if num_updates < 1:
        raise ValueError(f"num_updates={num_updates}: use at least 1")
    members: dict[str, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    num_updates = min(num_updates, len(members))
    updates: list[list[int]] = [[] for _ in range(num_updates)]
    # Whole groups, since the advantages of a group balance each other: a step with a part of one would push
    # its replies up or down as a whole.
    for position, indices in enumerate(members.values()):
        updates[position * num_updates // len(members)] += indices
    return [sorted(indices) for indices in updates]


def plan_micro_batches(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Spread units (a sample, or several with a shared prefix) over ranks by tokens, and each rank's over
    packed rows.

    Every rank gets the same number of micro-batches, since a rank with fewer would leave the others waiting
    in a collective operation; short ranks get empty lists at the end. A micro-batch has at most `max_tokens`,
    except that a longer unit has one of its own.

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
    # Long units are the hardest to place, so they go first. The index decides between equal lengths: every
    # rank computes the plan for itself and has to come to the same one.
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan = [_fill(units, lengths, max_tokens) for units in _spread(longest_first, lengths, num_ranks)]
    num_micro_batches = max(len(micro_batches) for micro_batches in plan)
    return [
        micro_batches + [[] for _ in range(num_micro_batches - len(micro_batches))] for micro_batches in plan
    ]


def _spread(longest_first: list[int], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Longest processing time first: each unit to the rank with the fewest tokens so far (Graham 1969)."""
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in longest_first:
        rank = loads.index(min(loads))
        by_rank[rank].append(index)
        loads[rank] += lengths[index]
    return by_rank


def _fill(longest_first: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit decreasing bin packing. The fullest row comes first, so that all ranks run rows of about one
    size at a time and wait little for each other."""
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
