"""Sentence, word and n-gram counts against hand-counted examples."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.simulator.sentences import (
    MAX_SENTENCES,
    content_words,
    ngrams,
    overlap,
    plain,
    ramp,
    sentences,
    words,
)


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


def test_words_are_lower_case_with_plain_apostrophes():
    assert words("You\u2019re LATE, it's 5") == ["you're", "late", "it's", "5"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\u00dcber caf\u00e9, na\u0131ve \ufb01ne", ["uber", "cafe", "na\u0131ve", "fine"]),
        ("cafe\u0301 \uff36\uff25\uff32\uff39", ["cafe", "very"]),
        ("\u6211\u5f88\u96be\u8fc7\uff0c\u597d\u3002", ["\u6211\u5f88\u96be\u8fc7", "\u597d"]),
        ("\ud55c\uad6d\uc5b4 \u043c\u043e\u0439", ["\ud55c\uad6d\uc5b4", "\u043c\u043e\u0438"]),
    ],
)
def test_words_have_no_marks_and_scripts_stay(text, found):
    assert words(text) == found


@given(st.text(max_size=60))
def test_canonically_equal_texts_have_equal_words(text):
    for form in ("NFC", "NFD"):
        assert words(unicodedata.normalize(form, text)) == words(text)
    assert not any(unicodedata.category(c).startswith("M") for c in plain(text))


def test_content_words_drop_grammar_and_inflection():
    assert content_words("You were scrubbing the walls, one scrub at a time, 580 times") == {
        "scrub",
        "wal",
        "580",
        "tim",
    }


def test_overlap_is_the_share_of_own_ngrams():
    # own bigrams: (a b), (b c), (c d); known are (b c) and (c d)
    assert overlap(list("abcd"), [list("xbcd")], 2) == 2 / 3
    assert overlap(["a"], [["a"]], 2) == 0.0


def test_ramp_is_linear_between_its_ends():
    assert [ramp(value, 1.0, 3.0) for value in (0.0, 1.0, 2.0, 3.0, 9.0)] == [0.0, 0.0, 0.5, 1.0, 1.0]


@given(st.text(max_size=400))
def test_any_text_is_cut_without_error(text):
    parts = sentences(text)
    assert len(parts) <= MAX_SENTENCES
    assert all(any(c.isalpha() for c in part) for part in parts)


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 5))
def test_number_of_ngrams(tokens, n):
    assert len(ngrams(tokens, n)) == max(0, len(tokens) - n + 1)
