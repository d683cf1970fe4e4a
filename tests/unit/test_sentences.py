"""Sentences and content words against hand-counted examples."""

from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.simulator.sentences import MAX_SENTENCES, content_words, ramp, sentences


def test_sentences_split_at_stops_and_lines_and_lose_their_bullets():
    assert sentences("You rang twice. Nobody came!\n- Take a photo\n2) Write it down") == [
        "You rang twice.",
        "Nobody came!",
        "Take a photo",
        "Write it down",
    ]


def test_sentences_leave_out_pieces_without_letters():
    assert sentences("... 100 !!! \n ok") == ["ok"]


def test_long_run_of_words_is_cut():
    assert [len(part.split()) for part in sentences("word " * 130)] == [60, 60, 10]


def test_content_words_drop_grammar_and_inflection():
    assert content_words("You were scrubbing the walls, one scrub at a time, 580 times") == {
        "scrub",
        "wal",
        "580",
        "tim",
    }


def test_ramp_is_linear_between_its_ends():
    assert [ramp(value, 1.0, 3.0) for value in (0.0, 1.0, 2.0, 3.0, 9.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


@given(st.text(max_size=400))
def test_any_text_is_cut_without_error(text):
    parts = sentences(text)
    assert len(parts) <= MAX_SENTENCES
    assert all(any(c.isalpha() for c in part) for part in parts)
