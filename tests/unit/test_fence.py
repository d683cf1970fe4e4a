"""The fence lets nothing through that marks structure, and leaves ordinary words as they are."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlver_dist.simulator.fence import LOOKED_AT, STRUCTURAL, fence, json_line, tidy

ANYTHING = st.text(max_size=300) | st.text(alphabet='<|im_start>[/INST]{}:"\\think \n\u200b\uff1c\uff5c\ufe64', max_size=300)
TAGS = ("<|im_end|>", "</s>", "[INST]", "<<SYS>>", "{persona}", "${x}", "{% raw %}", "### System:", "\uff1c\uff5cUser\uff5c\uff1e")


def words(text, **options):
    return fence(text, **({"max_bytes": 4000} | options)).text


@given(ANYTHING)
@example("\ud800<|im_end|>\x00\u2028")
def test_no_structure_survives(text):
    fenced = words(text)
    assert not STRUCTURAL & set(unicodedata.normalize("NFKC", fenced))
    assert all(character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn") for character in fenced)
    line = json_line(text=fenced)
    assert json.loads(line) == {"text": fenced}
    assert len(line.splitlines()) == 1


@given(ANYTHING)
def test_fencing_again_changes_nothing(text):
    once = words(text)
    assert words(once) == once


@given(ANYTHING, st.integers(0, 200))
@example(" ", 0)
@example("a" + 100 * " ", 10)
def test_the_limit_counts_bytes(text, limit):
    fenced = fence(text, max_bytes=limit)
    assert len(fenced.text.encode()) <= limit
    too_long = len(words(text, max_bytes=10**6).encode()) > limit
    assert (fenced.cut > 0) == (too_long or len(text) > LOOKED_AT * limit)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_lose_their_form_and_stay_readable(tag):
    fenced = words(f"Hello {tag} there")
    assert tag not in fenced
    assert fenced.startswith("Hello ") and fenced.endswith(" there") and len(fenced) > len("Hello  there")


@pytest.mark.parametrize(
    "text",
    [
        "I'm so sorry. That must hurt - really, it's \u00bd past ten!",
        "\u4f60\u597d\uff0c\u4eca\u5929\u600e\u4e48\u6837\uff1f\u201c\u597d\u201d\u3002",
        "\u00e9t\u00e9 \u2764",
    ],
)
def test_ordinary_words_stay(text):
    assert words(text) == text


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("<think>plan</think> Hi", "Hi"),
        ("plan </think> Hi", "Hi"),
        ("Hi <think> plan", "Hi"),
        ("<THINK >a</think>Hi<thinking>b</thinking>", "Hi"),
        ("<th\u200bink>plan</th\u200bink>Hi", "Hi"),
        ("\uff1cthink\uff1eplan\uff1c/think\uff1eHi", "Hi"),
        ("<|begin_of_thought|>plan<|end_of_thought|>Hi", "Hi"),
        ("[THINK]plan[/THINK]Hi", "Hi"),
        ("I have been [thinking of you] a lot", "I have been (thinking of you) a lot"),
    ],
)
def test_thinking_is_not_heard(text, heard):
    assert words(text) == heard


def test_what_was_found_is_counted():
    fenced = fence("a\u200bb\u202e [x] <think>12</think>" + "z" * 20, max_bytes=10)
    assert (fenced.text, fenced.hidden, fenced.markup, fenced.cut) == ("ab (x) zzz", 2, 2, 17)
    assert fenced.thought == len("<think>12</think>") - 1


def test_piled_up_marks_are_thinned():
    assert words("z" + "\u0316" * 50 + "a") == "z" + "\u0316" * 4 + "a"


def test_a_sheet_keeps_its_layout():
    assert tidy("# Name: A\n\n- likes <b>\u200b {x}") == "# Name: A\n\n- likes \u2039b\u203a (x)"
