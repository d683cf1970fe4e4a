"""Sentences and content words of a reply or message, as the appraisers count them."""

from __future__ import annotations

import re

from rlver_dist.text import plain, words

MAX_SENTENCES = 48
"""Sentences of one text that are looked at; bounds the cost of an endless reply."""
MAX_SENTENCE_WORDS = 60
"""A longer run of words without a full stop is cut into pieces of this length."""

_BREAK = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])[\"')\]]*\s+|\n+")
_BULLET = re.compile(r"^\s*(?:[-*\u2022#>]+|\d{1,2}[.)])\s+")

FUNCTION_WORDS = frozenset(
    """
a about after again against all also although always am an and another any anybody anyone anything are aren't
around as at away back be because been before behind being between both but by came can can't cannot come
could couldn't did didn't do does doesn't doing don't done down each either else enough even ever every
everybody everyone everything few first for from get gets getting go goes going gone got had hadn't has hasn't
have haven't having he he'd he'll he's her here hers herself him himself his how i i'd i'll i'm i've if in
into is isn't it it'd it'll it's its itself just last least less let let's like made make makes many may maybe
me might mine more most much must my myself neither never no nobody none nor not nothing now of off often on
once one only onto or other others our ours out over own perhaps put quite rather really said same say says
she she'd she'll she's should shouldn't since so some somebody someone something sometimes still such take
than that that'd that'll that's the their theirs them themselves then there there's these they they'd they'll
they're they've thing things this those though through till to together too took toward towards two under
until up upon us very was wasn't way we we'd we'll we're we've well went were weren't what what's when where
which while who who's whole whom whose why will with within without won't would wouldn't yes yet you you'd
you'll you're you've your yours yourself
""".split()
)
"""English words that carry grammar more than matter; about half of the words of any English prose."""


def stem(word: str) -> str:
    """A crude stem: the word without its inflection, a final e or a doubled last letter; at most its first
    six letters."""
    word = word.removesuffix("'s")
    for suffix in ("ing", "ies", "ied", "ed", "es", "ly", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    word = word.removesuffix("e") if len(word) > 3 else word
    return (word[:-1] if len(word) > 3 and word[-1] == word[-2] else word)[:6]


def content_words(text: str) -> set[str]:
    """Stems of the words that carry matter: no function words, nothing shorter than three letters unless it
    has a digit."""
    return {
        stem(word)
        for word in words(text)
        if word not in FUNCTION_WORDS and (len(word) > 2 or any(c.isdigit() for c in word))
    }


def sentences(text: str) -> list[str]:
    """The sentences of `text` that hold at least one letter, bullets removed, at most `MAX_SENTENCES`."""
    found: list[str] = []
    for piece in _BREAK.split(plain(text)):
        piece = _BULLET.sub("", piece).strip()
        tokens = piece.split()
        for start in range(0, len(tokens), MAX_SENTENCE_WORDS):
            part = " ".join(tokens[start : start + MAX_SENTENCE_WORDS])
            if any(c.isalpha() for c in part):
                found.append(part)
        if len(found) >= MAX_SENTENCES:
            return found[:MAX_SENTENCES]
    return found


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high`, linear between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))
