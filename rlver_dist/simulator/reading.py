"""What a listener gets of an untrusted text: the characters that show, without what is marked as thinking.

Every user hears a reply through `hear`, whether a prompt is made of it (`llm/fence.py`) or rules read its
words (`rules/appraisal.py`, `lexical.py`), so that a reply cannot show one of them other words than the rest.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass

# U+25C1 and U+25B7 are the brackets of some models' thinking tags. U+226E and U+226F (not less, not greater)
# are what Unicode composes of "<" or ">" and a combining stroke.
SIGNS = '<>[]{}|\\`#":/\u25c1\u25b7\u226e\u226f'
"""Characters that chat templates, their switches, JSON and placeholders are made of."""
MAX_MARKS = 4
"""Combining marks on one character; written languages need fewer."""

# Invisible although their category is a letter, mark or symbol (Unicode, Default_Ignorable_Code_Point, the
# blank Braille cell and the place of an object that is not there).
_INVISIBLE_RANGES = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xFFFC, 0xFFFC),
    (0xE0000, 0xE0FFF),
)
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
# What any reader may take for the end of a line: more than "\n", or a text could begin a line of its own.
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_RESERVED = "think"
"""Tags of this name (or `thinking`) mark nothing but thinking, even alone. Other names are also what people
write into a placeholder, such as `<reason>`, and mark thinking only in pairs."""
_NAMES = r"think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|analysis"
# The ways in which models and their chat templates mark thinking: <think>, </think>, <|thinking|>,
# <ns:reasoning>, <|end_of_thought|>, a tag with attributes; [THINK] in capitals alone, since people write
# [think] themselves; and the triangles. Names and attributes have a longest length, so that matching takes
# linear time.
_TAG = re.compile(
    r"(?i:<\|?(?P<close>/|end_of_|end_)?(?:\w{1,12}:|begin_of_|start_)?"
    rf"(?P<name>{_NAMES})(?:\s+\w{{1,20}}\s*=[^<>]{{0,80}})?\s*\|?>)"
    r"|(?P<shut>\[/THINK\]|\u25c1/think\u25b7)|\[THINK\]|\u25c1think\u25b7"
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Heard:
    """A text as it is heard.

    Attributes:
        text: without invisible or control characters other than line feeds, with few marks on each character,
            in Unicode's NFC.
        hidden: invisible characters that were left out.
        thought: characters that were left out as thinking.
    """

    text: str
    hidden: int
    thought: int


def hear(text: str, *, own: bool = False) -> Heard:
    """What is heard of `text`, lone surrogates and all; in the user's `own` words nothing counts as
    thinking."""
    shown = text.translate(_VISIBLE)
    said = shown if own else _without_thinking(shown)
    return Heard(
        text=_settled(said),
        hidden=sum(_VISIBLE[ord(character)] is None for character in text),
        thought=len(shown) - len(said),
    )


class _Visible(dict[int, str | None]):
    """A `str.translate` table, filled as characters are met: code point -> what a reader sees, None where
    that is nothing. Most texts have few different characters, and looking one up is slow."""

    def __missing__(self, code: int) -> str | None:
        self[code] = seen = _seen(chr(code))
        return seen


_VISIBLE = _Visible()


def _seen(character: str) -> str | None:
    # All line ends become one and all spaces another, so that no later step has to know the others.
    if character in _LINE_ENDS:
        return "\n"
    category = unicodedata.category(character)
    if category == "Zs" or character == "\t":
        return " "
    if category in _INVISIBLE_CATEGORIES or any(
        first <= ord(character) <= last for first, last in _INVISIBLE_RANGES
    ):
        return None
    plain = unicodedata.normalize("NFKC", character)
    # Full-width punctuation that marks nothing is how Chinese is written, so only letters, digits and marks
    # are folded.
    folds = plain.isascii() and any(sign.isalnum() or sign in SIGNS for sign in plain)
    return plain if folds else unicodedata.normalize("NFC", character)


def _settled(text: str) -> str:
    """`text` in NFC, without the marks that sit on nothing or pile up on one character beyond `MAX_MARKS`."""
    if text.isascii():
        return text
    kept: list[str] = []
    # A mark at the very beginning sits on nothing, so there is no room before the first character.
    room = 0
    for character in text:
        if not unicodedata.category(character).startswith("M"):
            room = 0 if character.isspace() else MAX_MARKS
        elif room:
            room -= 1
        else:
            continue
        kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept))


@dataclass(kw_only=True, slots=True, frozen=True)
class _Tag:
    name: str
    closes: bool
    start: int
    end: int


def _without_thinking(text: str) -> str:
    """What is said aloud: nothing between two tags of one name, and nothing before a lone closing tag or
    behind a lone open one where the name is `_RESERVED`.

    It takes time in proportion to the text times the logarithm of its tags, so that a reply full of tags
    cannot hold up the service.
    """
    tags = [
        _Tag(
            name=_kind(found["name"]),
            closes=bool(found["close"] or found["shut"]),
            start=found.start(),
            end=found.end(),
        )
        for found in _TAG.finditer(text)
    ]
    # Places of the closing tags by name, ascending: the partner of an open tag is found by bisection.
    closing: dict[str, list[int]] = {}
    for place, tag in enumerate(tags):
        if tag.closes:
            closing.setdefault(tag.name, []).append(place)
    said: list[str] = []
    start = 0
    for place, tag in enumerate(tags):
        # Inside a block that is left out already.
        if tag.start < start:
            continue
        if tag.closes:
            # Chat templates may open the thinking in the prompt, and the model then writes only its end.
            if tag.name == _RESERVED:
                said = []
                start = tag.end
            continue
        places = closing.get(tag.name, [])
        number = bisect_left(places, place)
        if number < len(places):
            said.append(text[start : tag.start])
            start = tags[places[number]].end
        elif tag.name == _RESERVED:
            # Cut off before it closed: all that follows was thinking.
            said.append(text[start : tag.start])
            start = len(text)
    # The space keeps what was on both sides of a block from becoming a word together.
    return " ".join([*said, text[start:]])


def _kind(name: str | None) -> str:
    """What a tag's closing tag has to be named; None is a form without a name."""
    return _RESERVED if name is None or name.lower() == "thinking" else name.lower()
