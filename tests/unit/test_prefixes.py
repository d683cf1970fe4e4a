"""Samples that share a shared prefix: which ones, and that every token still sees its own sample's prefix and
nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.experience.packing import PackedRow, pack
from rlver_dist.experience.prefixes import Unit, make_units
from rlver_dist.experience.samples import TurnSample
from tests.unit import builders

UNLIMITED = 10**6


def make_sample(context: list[int], trained: list[int], *, dialogue: str = "d", after: int = 0) -> TurnSample:
    """A sample that ends with `after` tokens of context behind the trained ones."""
    token_ids = context + trained + [7] * after
    mask = [False] * len(context) + [True] * len(trained) + [False] * after
    return builders.sample(token_ids, mask, dialogue_id=dialogue)


def units_of(samples: list[TurnSample], *, share: bool = True, max_tokens: int = UNLIMITED) -> list[Unit]:
    return make_units(samples, range(len(samples)), share_prefixes=share, max_tokens=max_tokens)


def visible(row: PackedRow) -> list[list[int]]:
    """For each token of the row, the tokens that its span lets it attend, itself the last of them."""
    seen, start = [], 0
    for span in row.spans:
        context = range(span.context_start, span.context_start + span.context_length)
        seen += [[*context, *range(start, start + offset + 1)] for offset in range(span.length)]
        start += span.length
    assert start == len(row.token_ids)
    return seen


THINK = [
    make_sample([1, 2], [50, 51, 3]),
    make_sample([1, 2, 3, 4], [60, 5]),
    make_sample([1, 2, 3, 4, 5, 6], [70, 71, 72, 8]),
]
"""Three turns: thoughts (50 and above) stay in their own turn, the replies 3 and 5 become history."""


def test_turns_of_a_think_dialogue_branch_off_the_longest_history():
    assert units_of(THINK) == [
        Unit(indices=[0, 1, 2], shared_prefix=[1, 2, 3, 4, 5, 6], num_tokens=6 + 3 + 2 + 4)
    ]
    assert units_of(THINK, share=False) == [
        Unit(indices=[index], shared_prefix=[], num_tokens=length) for index, length in enumerate((5, 6, 10))
    ]


def test_a_shared_row_by_hand():
    row = pack(THINK[:2], units_of(THINK[:2]))
    assert row.token_ids.tolist() == [1, 2, 3, 4, 50, 51, 3, 60, 5]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 4, 4, 5]
    assert [(span.length, span.context_start, span.context_length) for span in row.spans] == [
        (4, 0, 0),
        (3, 0, 2),
        (2, 0, 4),
    ]
    assert row.target_index.tolist() == [4, 5, 6, 7, 8]
    assert row.logit_index.tolist() == [1, 4, 5, 3, 7]
    assert visible(row)[6] == [0, 1, 4, 5, 6]


def test_who_does_not_fit_stands_alone():
    edited = make_sample([1, 9, 3, 4], [61])
    later_context = make_sample([1, 2], [52], after=1)
    elsewhere = make_sample([1, 2], [53], dialogue="e")
    samples = [*THINK, edited, later_context, elsewhere]
    assert [(unit.indices, unit.shared_prefix) for unit in units_of(samples)] == [
        ([4], []),
        ([0, 1, 2], [1, 2, 3, 4, 5, 6]),
        ([3], []),
        ([5], []),
    ]


def test_two_lines_of_history_are_two_prefixes():
    other = [make_sample([1, 9, 3], [61]), make_sample([1, 9, 3, 9], [62])]
    assert [unit.indices for unit in units_of([*THINK, *other])] == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(15, [[0, 1, 2]]), (14, [[0, 2], [1]]), (12, [[1, 2], [0]]), (9, [[2], [0, 1]]), (4, [[2], [1], [0]])],
)
def test_a_unit_of_several_keeps_to_the_budget(max_tokens: int, expected: list[list[int]]):
    assert [unit.indices for unit in units_of(THINK, max_tokens=max_tokens)] == expected


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=4)
DRAWN_DIALOGUE = st.lists(
    st.tuples(TOKENS, TOKENS, st.sampled_from(["grow", "edit"]), st.integers(0, 1)), max_size=5
)


def draw_samples(dialogues: list[list[tuple[list[int], list[int], str, int]]]) -> list[TurnSample]:
    """Samples of dialogues whose context grows, or starts again at an edit; some have context after their
    trained tokens."""
    samples = []
    for number, turns in enumerate(dialogues):
        context: list[int] = []
        for added, trained, change, after in turns:
            context = (context if change == "grow" else []) + added
            samples.append(make_sample(context, trained, dialogue=str(number), after=after))
    return samples


@given(st.lists(DRAWN_DIALOGUE, max_size=3), st.booleans(), st.integers(1, 60))
def test_every_token_sees_exactly_its_own_samples_prefix(dialogues, share: bool, max_tokens: int):
    samples = draw_samples(dialogues)
    units = units_of(samples, share=share, max_tokens=max_tokens)
    assert sorted(index for unit in units for index in unit.indices) == list(range(len(samples)))
    assert all(unit.num_tokens <= max_tokens for unit in units if len(unit.indices) > 1)
    assert sum(unit.num_tokens for unit in units) <= sum(len(sample.token_ids) for sample in samples)
    if not units:
        return
    row = pack(samples, units)
    assert len(row.token_ids) == sum(unit.num_tokens for unit in units)
    seen, tokens, positions = visible(row), row.token_ids.tolist(), row.position_ids.tolist()
    expected = [
        (samples[index].token_ids, place)
        for index in row.indices
        for place, trained in enumerate(samples[index].loss_mask)
        if trained
    ]
    for target, logit_index, (token_ids, place) in zip(
        row.target_index.tolist(), row.logit_index.tolist(), expected, strict=True
    ):
        # The predicting token has seen the whole sample up to itself, each token at its own place, and
        # nothing besides.
        assert tokens[target] == token_ids[place]
        assert [tokens[index] for index in seen[logit_index]] == token_ids[:place]
        assert [positions[index] for index in seen[logit_index]] == list(range(place))
    for index, sights in enumerate(seen):
        # So has every token in between, whose hidden state the predicting tokens read.
        assert sights[-1] == index and positions[index] == len(sights) - 1
        assert all(seen[other] == sights[: place + 1] for place, other in enumerate(sights))
