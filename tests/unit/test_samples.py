"""Dialogues to rows of tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.dialogue import Turn
from rlver_dist.experience.samples import to_samples
from tests.unit import builders


def make_turn(
    index: int, prompt_ids: list[int], reply_ids: list[int], logprobs: list[float] | None = None
) -> Turn:
    return builders.turn(
        index,
        prompt_ids=prompt_ids,
        reply_ids=reply_ids,
        logprobs=[-float(token) for token in reply_ids] if logprobs is None else logprobs,
    )


def test_turns_that_extend_the_history_merge_into_one_row():
    dialogue = builders.dialogue([make_turn(0, [1, 2], [3, 4]), make_turn(1, [1, 2, 3, 4, 5], [6])])
    (sample,) = to_samples(dialogue)
    assert sample.token_ids == [1, 2, 3, 4, 5, 6]
    assert sample.loss_mask == [False, False, True, True, False, True]
    assert sample.rollout_logprobs == [0.0, 0.0, -3.0, -4.0, 0.0, -6.0]
    assert (sample.dialogue_id, sample.group_id, sample.turn_index) == ("d", "g", 0)
    assert sample.num_trained == 3
    assert sample.trained_logprobs().tolist() == [-3.0, -4.0, -6.0]


def test_an_edited_history_opens_a_new_row():
    # Turn 1's prompt leaves out token 3 (say, thinking); turn 2 extends turn 1.
    dialogue = builders.dialogue(
        [make_turn(0, [1, 2], [3, 4]), make_turn(1, [1, 2, 4, 5], [6]), make_turn(2, [1, 2, 4, 5, 6, 7], [8])]
    )
    first, second = to_samples(dialogue)
    assert (first.token_ids, first.loss_mask, first.turn_index) == (
        [1, 2, 3, 4],
        [False, False, True, True],
        0,
    )
    assert (second.token_ids, second.turn_index) == ([1, 2, 4, 5, 6, 7, 8], 1)
    assert second.loss_mask == [False, False, False, False, True, False, True]


def test_a_prompt_shorter_than_the_history_opens_a_new_row():
    samples = to_samples(builders.dialogue([make_turn(0, [1, 2], [3]), make_turn(1, [1, 2], [4])]))
    assert [sample.token_ids for sample in samples] == [[1, 2, 3], [1, 2, 4]]


def test_an_empty_reply_trains_nothing_and_breaks_nothing():
    assert to_samples(builders.dialogue([make_turn(0, [1, 2], [])])) == []
    (sample,) = to_samples(builders.dialogue([make_turn(0, [1, 2], []), make_turn(1, [1, 2, 3], [4])]))
    assert (sample.token_ids, sample.loss_mask) == ([1, 2, 3, 4], [False, False, False, True])


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
            st.lists(st.integers(0, 3), max_size=4),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_every_sampled_token_is_trained_exactly_once_after_its_own_prompt(
    drawn: list[tuple[list[int], list[int], bool]],
):
    turns, history, serial = [], [], 0
    for index, (context, reply, keeps_history) in enumerate(drawn):
        prompt = (history if keeps_history else []) + context
        turns.append(
            make_turn(index, prompt, reply, [-float(serial + offset) for offset in range(len(reply))])
        )
        serial += len(reply)
        history = prompt + reply
    before = [(list(turn.prompt_ids), list(turn.reply_ids)) for turn in turns]
    trained = []
    for sample in to_samples(builders.dialogue(turns)):
        assert len(sample.token_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs)
        for position, is_trained in enumerate(sample.loss_mask):
            if is_trained:
                trained.append(
                    (
                        sample.token_ids[:position],
                        sample.token_ids[position],
                        sample.rollout_logprobs[position],
                    )
                )
            else:
                assert sample.rollout_logprobs[position] == 0.0
    expected = [
        (turn.prompt_ids + turn.reply_ids[:offset], token, turn.logprobs[offset])
        for turn in turns
        for offset, token in enumerate(turn.reply_ids)
    ]
    assert trained == expected
    assert before == [(turn.prompt_ids, turn.reply_ids) for turn in turns]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (make_turn(2, [], [1]), "d, turn 2: no prompt"),
        (make_turn(0, [1], [1, 2], [-1.0]), "1 log-probs for 2"),
        (make_turn(0, [1], [1], [math.nan]), "not finite"),
    ],
)
def test_a_broken_turn_is_refused(turn: Turn, message: str):
    with pytest.raises(ValueError, match=message):
        to_samples(builders.dialogue([turn]))
