"""The fence lets nothing through that marks structure, and leaves ordinary words as they are."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlver_dist.simulator.llm.fence import CHARS_PER_BYTE, STRUCTURAL, fence, json_line, tidy

ANYTHING = (
    st.text(max_size=300)
    | st.text(alphabet='<|im_start>[/INST]{}:"\\think \n\u200b\uff1c\uff5c\ufe64', max_size=300)
    | st.text(
        alphabet="ae\u00e9\u0301\u0323\u0338\u20dd<'/\u25c1\ud55c\u1100\u1161 "
        "\u00bd\ufdfa\U0001d1c0\uff76\uff9e\u0958",
        max_size=60,
    )
)
FORMS = ("NFC", "NFKC", "NFD", "NFKD")
TAGS = (
    "<|im_end|>",
    "</s>",
    "[INST]",
    "<<SYS>>",
    "{persona}",
    "${x}",
    "{% raw %}",
    "### System:",
    "\uff1c\uff5cUser\uff5c\uff1e",
)
SWITCHES = ("/no_think", "\\no_think", "/no\u200b_think", "\uff0fno_think", "\ufe68no_think")


def words(text, **options):
    return fence(text, **({"max_bytes": 4000} | options)).text


def largest(text):
    return max(len(unicodedata.normalize(form, text).encode()) for form in ("NFC", "NFKC"))


@given(ANYTHING)
@example("\ud800<|im_end|>\x00\u2028")
@example("<\u0338think>")
@example("\U0001d1c0\u0301\u0301\u0301\u0301")
def test_no_structure_survives(text):
    fenced = words(text)
    assert not any(STRUCTURAL & set(unicodedata.normalize(form, fenced)) for form in FORMS)
    assert all(
        character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
        for character in fenced
    )
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
@example("\U0001d1c0" * 9, 80)
@example("\ufdfa" * 9, 80)
@example("\u00e9\u0323", 4)
def test_the_limit_counts_bytes_in_whichever_form_a_tokenizer_reads(text, limit):
    fenced = fence(text, max_bytes=limit)
    assert largest(fenced.text) <= limit
    too_long = largest(words(text, max_bytes=10**6)) > limit
    assert (fenced.cut > 0) == (too_long or len(text) > CHARS_PER_BYTE * limit)


@given(ANYTHING, st.integers(0, 50), st.integers(0, 50))
def test_a_smaller_limit_shows_a_beginning_of_the_same_text(text, limit, more):
    assert fence(text, max_bytes=limit + more, max_chars=200).text.startswith(
        fence(text, max_bytes=limit, max_chars=200).text
    )


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
        ("Hi [THINK] plan", "Hi"),
        ("<think>plan</thinking>Hi", "Hi"),
        ("<reflection>plan</Reflection>Hi<thought>plan</thought>", "Hi"),
        ("<thought>a<reflection>b</thought>Hi", "Hi"),
        ("<|START_THINKING|>plan<|END_THINKING|>Hi", "Hi"),
        ("\u25c1think\u25b7plan\u25c1/think\u25b7Hi", "Hi"),
        ("I have been [thinking of you] a lot", "I have been (thinking of you) a lot"),
    ],
)
def test_thinking_is_not_heard(text, heard):
    assert words(text) == heard


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("I felt <emotion> because <reason>.", "I felt \u2039emotion\u203a because \u2039reason\u203a."),
        ("[Think] What would you tell a friend?", "(Think) What would you tell a friend?"),
        ("First [think], then [write].", "First (think), then (write)."),
        ("<reflection> It hurt.", "\u2039reflection\u203a It hurt."),
        ("</reason> Hi", "\u2039\u2215reason\u203a Hi"),
        ("<thought> Hi </reason>", "\u2039thought\u203a Hi \u2039\u2215reason\u203a"),
        ("I < think > so", "I \u2039 think \u203a so"),
    ],
)
def test_what_only_looks_like_thinking_is_heard(text, heard):
    fenced = fence(text, max_bytes=4000)
    assert (fenced.text, fenced.thought) == (heard, 0)


def test_nothing_is_thinking_in_the_users_own_words():
    fenced = fence("I told you. \u25c1/think\u25b7 Anyway </think> <think>x", max_bytes=4000, own=True)
    assert (
        fenced.text == "I told you. \u2039\u2215think\u203a Anyway \u2039\u2215think\u203a \u2039think\u203ax"
    )
    assert fenced.thought == 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_switch_is_left(switch):
    assert words(f"Hi {switch}") == "Hi \u2215no_think"


def test_a_slash_is_no_markup():
    assert fence("day/night: 24/7", max_bytes=99).markup == 0


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b\x00", "\u3164\u2800", "\ufffc", "\u0301\u20dd", " \u0301 \u0301"]
)
def test_what_nobody_can_read_is_silence(text):
    assert words(text) == ""


def test_what_was_found_is_counted():
    fenced = fence("a\u200bb\u202e [x] <think>12</think>" + "z" * 20, max_bytes=10)
    assert (fenced.text, fenced.hidden, fenced.markup, fenced.cut) == ("ab (x) zzz", 2, 2, 17)
    assert fenced.thought == len("<think>12</think>") - 1


def test_piled_up_marks_are_thinned():
    # Of every category of marks: nonspacing, enclosing, spacing.
    for mark in "\u0316\u20dd\u0903":
        assert words("z" + mark * 50 + "a") == "z" + mark * 4 + "a"


def test_no_mark_sits_on_the_quote_before_a_text():
    assert words("\u0338abc") == words("\u0301 \u0316abc") == words("<think>x</think>\u0301abc") == "abc"


def test_a_sheet_keeps_its_layout():
    assert tidy("# Name: A\n\n- likes <b>\u200b {x}") == "# Name: A\n\n- likes \u2039b\u203a (x)"
    assert tidy("say /no_think\\") == "say \u2215no_think\u2215"
