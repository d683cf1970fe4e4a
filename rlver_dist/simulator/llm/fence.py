"""The policy's words as data: how untrusted text enters the prompt of a chat user.

Nothing here is a list of attacks. A text is reduced to characters that no chat template, JSON or placeholder
syntax is made of, and is then written as a JSON string on one line:

1. Invisible characters and thinking go (`reading.py`), and a compatibility form becomes the ASCII text that
   it stands for, so that nothing can hide from the next steps.
2. What marks structure (brackets, bars, slashes, quotes, colons, ...) becomes a like-looking character that
   marks nothing: a tag such as `<|im_start|>`, `[INST]` or `{persona}` and a switch such as `/no_think` stay
   readable and are none any more.
3. The text is cut at a number of bytes, and what was left out is reported beside it, not in it.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass

from rlver_dist.simulator.reading import SIGNS, hear

_FENCE_MAP = str.maketrans(SIGNS, "\u2039\u203a()()\u00a6\u2215'\u266f'\u2236\u2215\u2039\u203a\u2039\u203a")
# A persona sheet needs its headings, quotations and colons.
_TIDY_MAP = {code: plain for code, plain in _FENCE_MAP.items() if chr(code) not in '#":'}
# Quotes, colons and slashes are replaced too, but ordinary prose has them, so they do not count as markup.
_MARKUP = frozenset(SIGNS) - frozenset('":/')
STRUCTURAL = frozenset(SIGNS)
"""Characters that no fenced text holds."""
CHARS_PER_BYTE = 8
"""Characters that are read, as a multiple of the bytes that stay: room for what is taken out."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Fenced:
    """A text made harmless.

    Attributes:
        text: without `STRUCTURAL`, invisible or control characters; the only white space is single spaces.
            Empty where nothing that shows is left.
        hidden: invisible characters that were taken out.
        markup: brackets, bars and the like that were replaced.
        thought: characters that were taken out as thinking.
        cut: UTF-8 bytes beyond the limit, with those that were too far behind it to be looked at.
    """

    text: str
    hidden: int
    markup: int
    thought: int
    cut: int


def fence(text: str, *, max_bytes: int, max_chars: int | None = None, own: bool = False) -> Fenced:
    """Make an untrusted text harmless; see the module's docstring.

    Args:
        text: any string, lone surrogates included.
        max_bytes: UTF-8 bytes that stay, in NFC and in NFKC. A token of a byte-level vocabulary is one byte
            or more, so this bounds the tokens too, whichever of these the tokenizer turns its text into.
        max_chars: characters that are read at all; what is behind them is cut. None: `CHARS_PER_BYTE` times
            `max_bytes`.
        own: the user's own words, in which nothing counts as thinking.
    """
    # Without this bound, the time that a reply takes would grow with its length, which the policy chooses.
    num_read = CHARS_PER_BYTE * max_bytes if max_chars is None else max_chars
    heard = hear(text[:num_read], own=own)
    # On one line it cannot look like the lines and the task around it.
    plain = " ".join(heard.text.translate(_FENCE_MAP).split())
    kept = _cut(plain, max_bytes)
    return Fenced(
        text=kept,
        hidden=heard.hidden,
        markup=sum(heard.text.count(sign) for sign in _MARKUP),
        thought=heard.thought,
        # Lone surrogates have no bytes of their own; "replace" counts one for each.
        cut=len(plain[len(kept) :].encode("utf-8")) + len(text[num_read:].encode("utf-8", "replace")),
    )


def tidy(text: str) -> str:
    """A text of the operator's own files, such as a persona sheet: layout and punctuation stay, tags and
    invisible characters go."""
    # `own`: an operator's text marks no thinking, and nothing of it may vanish.
    return hear(text, own=True).text.translate(_TIDY_MAP).strip()


def json_line(**fields: object) -> str:
    """The fields as one line of JSON; texts keep their script, and none of them can end its string or the
    line."""
    return json.dumps(fields, ensure_ascii=False)


def _cut(text: str, max_bytes: int) -> str:
    """The longest beginning of `text` (in NFC) that has at most `max_bytes` bytes as it is and in NFKC."""

    # NFKC can write one character as many (U+FDFA as 18), and some tokenizers normalise to it: counted in one
    # form alone, a text could have far more tokens than bytes.
    def size(length: int) -> int:
        begin = text[:length]
        return max(len(begin.encode("utf-8")), len(unicodedata.normalize("NFKC", begin).encode("utf-8")))

    return text[: bisect_right(range(len(text) + 1), max_bytes, key=size) - 1]
