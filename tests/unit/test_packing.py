"""Packed rows, and the plan of which sample goes where."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.experience.balance import plan_micro_batches, split_updates
from rlver_dist.experience.packing import Span, column, pack
from rlver_dist.experience.prefixes import Unit, make_units
from rlver_dist.experience.samples import TurnSample
from tests.unit import builders

LENGTHS = st.lists(st.integers(1, 40), max_size=30)
DRAWN_SAMPLE = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6)


def make_sample(token_ids: list[int], loss_mask: list[bool]) -> TurnSample:
    rollout_logprobs = [
        -token / 8 if trained else 0.0 for token, trained in zip(token_ids, loss_mask, strict=True)
    ]
    return builders.sample(token_ids, loss_mask, rollout_logprobs=rollout_logprobs)


def test_plan_by_hand():
    # Longest first: 9 and 7 to ranks 0 and 1, 5 to rank 1 (7 < 9), 4 to rank 0 (9 < 12), 3 to rank 1 (12 <
    # 13). Rank 0 holds 9, 4 in rows of up to 10: [9], [4]. Rank 1 holds 7, 5, 3: [7, 3], [5].
    assert plan_micro_batches([5, 9, 3, 7, 4], num_ranks=2, max_tokens=10) == [[[1], [4]], [[2, 3], [0]]]


def test_an_over_long_sample_stands_alone_and_short_ranks_get_empty_rows():
    assert plan_micro_batches([2, 50, 2], num_ranks=2, max_tokens=10) == [[[1]], [[0, 2]]]
    assert plan_micro_batches([2, 50, 2], num_ranks=1, max_tokens=10) == [[[1], [0, 2]]]
    assert plan_micro_batches([8, 8, 8], num_ranks=2, max_tokens=10) == [[[0], [2]], [[1], []]]
    assert plan_micro_batches([5], num_ranks=3, max_tokens=10) == [[[0]], [[]], [[]]]
    assert plan_micro_batches([], num_ranks=2, max_tokens=10) == [[], []]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 60))
def test_plan_invariants(lengths: list[int], num_ranks: int, max_tokens: int):
    plan = plan_micro_batches(lengths, num_ranks, max_tokens)
    assert len(plan) == num_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert sorted(index for micro_batches in plan for row in micro_batches for index in row) == list(
        range(len(lengths))
    )
    for micro_batches in plan:
        for row in micro_batches:
            assert len(row) <= 1 or sum(lengths[index] for index in row) <= max_tokens
        used = [sum(lengths[index] for index in row) for row in micro_batches if row]
        # First fit never leaves two rows that would fit into one.
        assert all(one + other > max_tokens for position, one in enumerate(used) for other in used[:position])
    loads = [sum(lengths[index] for row in micro_batches for index in row) for micro_batches in plan]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert plan_micro_batches(lengths, num_ranks, max_tokens) == plan


@pytest.mark.parametrize(("lengths", "num_ranks", "max_tokens"), [([0], 1, 10), ([1], 0, 10), ([1], 1, 0)])
def test_plan_refuses_what_is_not_positive(lengths: list[int], num_ranks: int, max_tokens: int):
    with pytest.raises(ValueError, match="must be positive"):
        plan_micro_batches(lengths, num_ranks, max_tokens)


def test_updates_follow_whole_groups():
    assert split_updates(["a", "b", "a", "c", "b"], 2) == [[0, 1, 2, 4], [3]]
    assert split_updates(["a", "b", "a", "c", "b"], 3) == [[0, 2], [1, 4], [3]]
    assert split_updates(["a", "a"], 3) == [[0, 1]]
    assert split_updates([], 3) == []
    with pytest.raises(ValueError, match="num_updates=0"):
        split_updates(["a"], 0)


@given(st.lists(st.sampled_from("abcdefgh"), max_size=30), st.integers(1, 6))
def test_update_invariants(group_ids: list[str], num_updates: int):
    parts = split_updates(group_ids, num_updates)
    assert sorted(index for part in parts for index in part) == list(range(len(group_ids)))
    groups = [{group_ids[index] for index in part} for part in parts]
    assert sum(map(len, groups)) == len(set(group_ids))
    assert len(parts) == min(num_updates, len(set(group_ids)))
    sizes = [len(group) for group in groups]
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def alone(*indices: int) -> list[Unit]:
    return [Unit(indices=[index], shared_prefix=[], num_tokens=1) for index in indices]


def test_pack_by_hand():
    samples = [
        make_sample([10, 11, 12], [False, True, True]),
        make_sample([99], [False]),
        make_sample([20, 21], [False, True]),
    ]
    row = pack(samples, alone(2, 0))
    assert row.indices == [2, 0]
    assert row.token_ids.tolist() == [20, 21, 10, 11, 12]
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert row.spans == [Span(length=2), Span(length=3)]
    assert row.target_index.tolist() == [1, 3, 4]
    assert row.logit_index.tolist() == [0, 2, 3]
    assert column([torch.tensor([1.5, 2.5]), torch.tensor([]), torch.tensor([-2.0])], row).tolist() == [
        -2.0,
        1.5,
        2.5,
    ]
    assert column([sample.trained_logprobs() for sample in samples], row).tolist() == [
        -21 / 8,
        -11 / 8,
        -12 / 8,
    ]


def test_no_unit_gives_a_row_that_trains_nothing():
    row = pack([make_sample([1, 2], [False, True])], [])
    assert (row.indices, row.spans, row.token_ids.shape) == ([], [Span(length=2)], (2,))
    assert len(row.target_index) == len(row.logit_index) == len(column([torch.ones(1)], row)) == 0


def test_all_rows_have_the_same_types():
    sample = make_sample([1, 2], [False, True])
    for indices in ([], [0], [0, 0]):
        row = pack([sample], alone(*indices)).to("cpu")
        assert {
            tensor.dtype for tensor in (row.token_ids, row.position_ids, row.target_index, row.logit_index)
        } == {torch.int64}
        assert column([torch.ones(1)], row).dtype == torch.float32
        assert len(row.token_ids) == len(row.position_ids) == sum(span.length for span in row.spans)


def test_pack_refuses_a_first_token_that_is_trained():
    with pytest.raises(ValueError, match="first token"):
        pack([make_sample([1, 2], [True, True])], alone(0))


@given(st.lists(DRAWN_SAMPLE, max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_planned_and_packed_rows_split_back_into_the_samples(
    drawn: list[list[tuple[int, bool]]], num_ranks: int, max_tokens: int
):
    samples = [
        make_sample(
            [token for token, _ in rows], [at > 0 and trained for at, (_, trained) in enumerate(rows)]
        )
        for rows in drawn
    ]
    units = make_units(samples, range(len(samples)), share_prefixes=False, max_tokens=max_tokens)
    values = [index + torch.arange(sample.num_trained) / 8 for index, sample in enumerate(samples)]
    seen = []
    for micro_batches in plan_micro_batches([unit.num_tokens for unit in units], num_ranks, max_tokens):
        for chosen in micro_batches:
            row = pack(samples, [units[index] for index in chosen])
            if not chosen:
                continue
            seen += row.indices
            lengths = [span.length for span in row.spans]
            assert [part.tolist() for part in row.token_ids.split(lengths)] == [
                samples[index].token_ids for index in row.indices
            ]
            assert row.position_ids.tolist() == [position for length in lengths for position in range(length)]
            mask = torch.zeros(len(row.token_ids), dtype=torch.bool)
            mask[row.target_index] = True
            assert [part.tolist() for part in mask.split(lengths)] == [
                samples[index].loss_mask for index in row.indices
            ]
            assert torch.equal(row.logit_index, row.target_index - 1)
            assert column(values, row).tolist() == [
                value for index in row.indices for value in values[index].tolist()
            ]
    assert sorted(seen) == list(range(len(samples)))
