"""Words and n-grams against hand-counted examples."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.text import distinct_overlap, ngrams, overlap, plain, words


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


def test_ngrams_by_hand():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams("abc", 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == [] and ngrams([], 1) == []


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 5))
def test_number_of_ngrams(tokens, n):
    assert len(ngrams(tokens, n)) == max(0, len(tokens) - n + 1)


def test_overlap_is_the_share_of_own_ngrams():
    # own bigrams: (a b), (b c), (c d); known are (b c) and (c d)
    assert overlap(list("abcd"), [list("xbcd")], 2) == 2 / 3
    assert overlap(["a"], [["a"]], 2) == 0.0


def test_repeated_ngrams_count_in_overlap_and_once_in_distinct_overlap():
    # own bigrams: (a b) twice, (b a); known is (a b)
    assert overlap(list("abab"), [list("ab")], 2) == 2 / 3
    assert distinct_overlap(list("abab"), list("ab"), 2) == 1 / 2
    assert distinct_overlap(["a"], ["a"], 2) == 0.0
