"""The policy's words as data: what an LLM user's prompt may hold of a text that nobody vouches for.

Nothing here is a list of attacks. A text is reduced to characters that no chat template, JSON or placeholder syntax is made of, and
is then written as a JSON string on one line:

1. Control, format, private and other invisible characters go, and a compatibility form becomes the ASCII text that it stands for
   (Unicode NFKC), so that nothing can hide from the next steps.
2. Thinking is taken out (the user never hears it).
3. What marks structure (brackets, bars, quotes, colons, ...) becomes a like-looking character that marks nothing: a tag such as
   `<|im_start|>`, `[INST]` or `{persona}` stays readable and is none any more.
4. The text is cut at a number of bytes, and what was left out is reported beside it, not in it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

# Invisible although their category is a letter, mark or symbol (Unicode, Default_Ignorable_Code_Point, and the blank Braille cell).
_INVISIBLE_RANGES = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164), (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0), (0xE0000, 0xE0FFF),
)  # fmt: skip
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_MARKS = {"<": "\u2039", ">": "\u203a", "[": "(", "]": ")", "{": "(", "}": ")", "|": "\u00a6", "\\": "/", "`": "'", "#": "\u266f"}
_PUNCTUATION = {'"': "'", ":": "\u2236"}
_FENCE_MAP = str.maketrans({**_MARKS, **_PUNCTUATION})
_TIDY_MAP = str.maketrans({mark: plain for mark, plain in _MARKS.items() if mark != "#"})
STRUCTURAL = frozenset({**_MARKS, **_PUNCTUATION})
"""Characters that no fenced text holds."""
_NAMES = r"(?:think|thinking|thoughts?|reason|reasoning|reflection|scratchpad|analysis)"
_OPEN_TAG = re.compile(
    rf"<\|?\s*(?:\w{{1,12}}:|begin_of_)?{_NAMES}(?:\s+\w{{1,20}}\s*=[^<>]{{0,80}})?\s*\|?>|\[THINK\]|\u25c1think\u25b7", re.IGNORECASE
)
_CLOSE_TAG = re.compile(rf"<\|?\s*(?:/\s*(?:\w{{1,12}}:)?|end_of_){_NAMES}\s*\|?>|\[/THINK\]|\u25c1/think\u25b7", re.IGNORECASE)
LOOKED_AT = 8
"""Characters that are looked at, as a multiple of the bytes that stay: room for what is taken out."""
MAX_COMBINING = 4
"""Combining marks on one character; written languages need fewer."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Fenced:
    """A text made harmless.

    Attributes:
        text: without `STRUCTURAL`, invisible or control characters; the only white space is single spaces.
        hidden: characters that were taken out because nobody sees them.
        markup: brackets, bars and the like that were replaced.
        thought: characters that were taken out as thinking.
        cut: UTF-8 bytes beyond the limit, with those that were too far behind it to be looked at.
    """

    text: str
    hidden: int
    markup: int
    thought: int
    cut: int


class _Visible(dict[int, str | None]):
    """A `str.translate` table, filled as characters are met: code point -> what a reader sees, None where that is nothing."""

    def __missing__(self, code: int) -> str | None:
        self[code] = seen = _seen(chr(code))
        return seen


_VISIBLE = _Visible()


def _seen(character: str) -> str | None:
    if character in _LINE_ENDS:
        return "\n"
    category = unicodedata.category(character)
    if category == "Zs" or character == "\t":
        return " "
    if category in _INVISIBLE_CATEGORIES or any(first <= ord(character) <= last for first, last in _INVISIBLE_RANGES):
        return None
    plain = unicodedata.normalize("NFKC", character)
    # Full-width punctuation that marks nothing is how Chinese is written, so only letters, digits and marks are folded.
    folds = plain.isascii() and any(sign.isalnum() or sign in STRUCTURAL for sign in plain)
    return plain if folds else character


def fence(text: str, *, max_bytes: int) -> Fenced:
    """Make an untrusted text harmless; see the module's docstring.

    Args:
        text: any string, lone surrogates included.
        max_bytes: UTF-8 bytes that stay. A token of a byte-level vocabulary is one byte or more, so this bounds the tokens too.
    """
    # What is certainly beyond the limit is not looked at: a reply may be as long as it likes, and time is not.
    text, beyond = text[: LOOKED_AT * max_bytes], text[LOOKED_AT * max_bytes :]
    visible = text.translate(_VISIBLE)
    heard = _without_thinking(visible)
    plain = _limit_combining(heard).translate(_FENCE_MAP)
    # On one line it cannot look like the lines and the task around it.
    encoded = " ".join(plain.split()).encode("utf-8")
    return Fenced(
        text=encoded[:max_bytes].decode("utf-8", errors="ignore"),
        hidden=sum(_VISIBLE[ord(character)] is None for character in text),
        markup=sum(heard.count(mark) for mark in _MARKS),
        thought=max(len(visible) - len(heard), 0),
        cut=max(len(encoded) - max_bytes, 0) + len(beyond.encode("utf-8", "replace")),
    )


def tidy(text: str) -> str:
    """A text of the operator's own files, such as a persona sheet: layout and punctuation stay, tags and invisible characters go."""
    return text.translate(_VISIBLE).translate(_TIDY_MAP).strip()


def json_line(**fields: Any) -> str:
    """The fields as one line of JSON; texts keep their script, and none of them can end its string or the line."""
    return json.dumps(fields, ensure_ascii=False)


def _without_thinking(text: str) -> str:
    """What is heard: no closed block of thinking, nothing before a lone closing tag, nothing behind a lone open one."""
    heard: list[str] = []
    start = 0
    while opened := _OPEN_TAG.search(text, start):
        closed = _CLOSE_TAG.search(text, opened.end())
        heard.append(text[start : opened.start()])
        start = closed.end() if closed else len(text)
    # The space keeps what was on both sides of a block from becoming a tag together.
    joined = " ".join([*heard, text[start:]])
    lone = [closed.end() for closed in _CLOSE_TAG.finditer(joined)]
    return joined[lone[-1] :] if lone else joined


def _limit_combining(text: str) -> str:
    """`text` without the marks that pile up on one character beyond `MAX_COMBINING`."""
    if text.isascii():
        return text
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= MAX_COMBINING:
            kept.append(character)
    return "".join(kept)
