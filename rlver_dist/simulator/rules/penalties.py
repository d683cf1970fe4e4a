"""What costs a reply emotion whatever else it says: repetition, wrong form, and tricks.

Each measure is 0 (clean) to 1 (as bad as it gets); `WEIGHTS` gives the points that 1 costs. A measure rises
between two bounds (`ramp`) instead of jumping at one, so that a policy is paid for a little less of a fault.
The bounds are chosen by hand; `python -m benchmarks.sanity` shows what comes of them on graded replies.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from rlver_dist.simulator.reading import hear
from rlver_dist.simulator.sentences import FUNCTION_WORDS, ramp
from rlver_dist.text import ngrams, overlap, plain, words

WEIGHTS: dict[str, float] = {
    "repetition": 10.0,
    "echo": 8.0,
    "formula": 4.0,
    "apologies": 7.0,
    "feeling_density": 12.0,
    "superlatives": 7.0,
    "foreign": 14.0,
    "word_salad": 12.0,
    "symbols": 12.0,
    "listing": 9.0,
    "questions": 4.0,
    "over_length": 4.0,
    "truncated": 2.5,
    "unaddressed": 5.0,
    "score_talk": 14.0,
    "copied": 9.0,
    "too_short": 4.0,
}
"""Points of emotion that each penalty costs at its full strength."""

_APOLOGY = re.compile(r"\b(?:sorry|apolog\w*|forgive me|my condolences|pardon)\b")
# A reply that talks of the user's emotion as a number, asks for a rating or addresses the machine behind the
# user. A number counts near a word for mood or score, or in a form such as 100/100: "I waited 40 minutes" is
# innocent.
_SCORE = re.compile(
    r"\b(?:emotions?|mood|feelings?|happiness|satisfaction|empathy|score|rating|reward|points?)\b[^.!?]{0,40}"
    r"\b(?:\d+|hundred|max\w*|full|highest)\b"
    r"|\b(?:\d{2,3}|hundred|max\w*|highest|full)\b[^.!?]{0,16}\b(?:emotion|mood|happiness|score|rating|reward|points?|marks)\b"
    r"|\bemotion[_ -]?(?:score|change|level|state|value)\b|\brate (?:me|this|my)\b"
    r"|\bset (?:your|my|the|user) \w*\s?(?:emotion|mood|score)\b"
    r"|[+]\s?10\b|\b(?:system|ignore) (?:prompt|override|all|previous)\b|\b100\s?/\s?100\b"
)
_SUPERLATIVES = frozenset(
    """
amazing incredible wonderful perfect brilliant genius fantastic awesome extraordinary magnificent marvellous
marvelous phenomenal exceptional outstanding gorgeous beautiful legendary legend hero heroic inspiring
inspiration special superb unbelievable stunning flawless angel star best greatest smartest kindest strongest
bravest superb adore goddess queen saint unmatched dazzling radiant impeccable divine magical unique talented
gifted remarkable
""".split()
)
FEELING_WORDS = frozenset(
    """
pain painful grief sad sadness hurt hurts hurting sorrow lonely loneliness heart heartbroken heartbreak
heartbreaking anger angry fear afraid scared anxious anxiety shame ashamed guilt guilty tears cry crying love
loved empathy compassion understand understanding understood feel feeling feelings felt emotion emotions
emotional suffering suffer despair hope hopeless comfort care caring overwhelmed overwhelming frustrated
frustrating frustration upset depressed depression joy happy happiness warm warmth gentle tender soul broken
ache aching validate validated valid support supported hug hugs listen listening hear heard sympathy
sympathetic sorry tough hard difficult worry worried
""".split()
)
_LISTENER = frozenset("you your yours yourself you're you've you'd you'll u".split())
# What imperatives of advice begin with.
_URGING = frozenset(
    """
ask be book bring call check choose do don't find get give go keep leave let let's listen look make phone pick
put ring say send set show sit sleep start stay stop take talk tell text think try wait walk write
""".split()
)
# Written lists at the beginning of a line, numbers in running text, and lists that are spoken.
_LIST_LINE = re.compile(r"^[^\S\n]*(?:[-*\u2022]|\d{1,2}[.)]|[a-h]\))\s+", re.MULTILINE)
_INLINE_NUMBER = re.compile(r"(?:^|[\s:;,])\(?\d{1,2}[.)]\s")
_ORDINAL = re.compile(
    r"\b(?:(?:first|second|third|fourth|fifth)(?:ly)?|next|also|furthermore|moreover|additionally)\b,"
)
# Unicode's categories of symbols, and of code points that are no characters.
_SYMBOLS = frozenset({"So", "Sk", "Cs", "Co", "Sm", "Cn"})
# Bold, headings, code, tags and tables: nobody says them aloud.
_MARKUP = re.compile(r"\*\*|^#{1,6}\s|```|</?\w+>|\|.*\|", re.MULTILINE)

SPOKEN_WORDS = 80
LONG_WORDS = 170
"""Words up to which a reply is spoken, and from which it is a lecture."""


def apologies(text: str) -> int:
    """Number of apologies in `text`."""
    return len(_APOLOGY.findall(plain(text).lower()))


def _symbol_share(text: str) -> float:
    seen = [c for c in text if not c.isspace()]
    # A sign that stands for letters, such as that of a trade mark, is no symbol.
    odd = sum(
        any(unicodedata.category(part) in _SYMBOLS for part in unicodedata.normalize("NFKC", c)) for c in seen
    )
    # In a long reply a row of emojis is a small share, so each symbol beyond the second counts by itself.
    return odd / max(1, len(seen)) + 0.01 * max(0, odd - 2)


def _foreign(text: str, tokens: list[str]) -> float:
    letters = [c for c in text if c.isalpha()]
    latin = sum(c.isascii() for c in letters) / max(1, len(letters))
    # A few words may hold no function word even in English; only their letters tell.
    if len(tokens) < 5:
        return 1.0 - ramp(latin, 0.6, 0.95)
    # Other languages in Latin letters hold few English function words.
    grammar = sum(token in FUNCTION_WORDS for token in tokens) / len(tokens)
    return max(1.0 - ramp(latin, 0.75, 0.97), 1.0 - ramp(grammar, 0.10, 0.26))


def _repetition(tokens: list[str]) -> float:
    # A share of so few n-grams would jump; a short text repeats if half of its words or fewer are distinct.
    if len(tokens) < 6:
        return 1.0 if len(tokens) >= 4 and len(set(tokens)) <= len(tokens) // 2 else 0.0
    pairs = ngrams(tokens, 2)
    triples = ngrams(tokens, 3)
    repeated_pairs = 1.0 - len(set(pairs)) / len(pairs)
    repeated_triples = 1.0 - len(set(triples)) / len(triples)
    # A word may come back in ever new phrases, which n-grams do not see. Function words always come back.
    matter = Counter(token for token in tokens if token not in FUNCTION_WORDS)
    most = max(matter.values(), default=0)
    return max(
        ramp(repeated_pairs, 0.12, 0.45),
        ramp(repeated_triples, 0.04, 0.30),
        ramp(most, 3.5, 7.0) if most / len(tokens) > 0.06 else 0.0,
    )


def _formula(tokens: list[str], past: list[list[str]]) -> float:
    """How far the reply begins as an earlier one of the dialogue did, whatever comes after."""
    return ramp(max((_common_words(tokens, one) for one in past), default=0), 1.5, 4.0)


def _common_words(tokens: list[str], other: list[str]) -> int:
    """Number of words with which both begin."""
    pairs = enumerate(zip(tokens, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(other)))


def _unaddressed(text: str, tokens: list[str]) -> float:
    """How far a longer reply talks past the listener, as somebody's story does: hardly a "you", no question,
    nothing urged."""
    turned = sum(token in _LISTENER for token in tokens) / len(tokens) + (0.012 if "?" in text else 0.0)
    # An imperative addresses the listener without a "you".
    starts = [words(one)[:1] for one in re.split(r"[.!?\n]+", text)]
    urged = any(start and start[0] in _URGING for start in starts)
    return 0.0 if urged else (1.0 - ramp(turned, 0.004, 0.022)) * ramp(len(tokens), 12, 24)


def _word_salad(tokens: list[str]) -> float:
    """Too few words of grammar, or too many, for the text's length; long texts only."""
    # A short sentence may be all grammar ("I am with you") or hold none.
    if len(tokens) < 8:
        return 0.0
    grammar = sum(token in FUNCTION_WORDS for token in tokens) / len(tokens)
    return max(1.0 - ramp(grammar, 0.22, 0.34), ramp(grammar, 0.82, 0.95))


def measure(
    reply: str, earlier: list[str], heard: list[str], truncated: bool, *, written: str
) -> dict[str, float]:
    """Strength (0 to 1, rounded) of every penalty.

    Args:
        reply: the policy's reply as it is heard, not empty.
        earlier: its earlier replies in this dialogue.
        heard: the user's messages so far.
        truncated: the reply was cut at the token limit.
        written: the reply as it was written, in which invisible symbols and the markup of what is not heard
            count as well.
    """
    text = plain(reply)
    shown = plain(hear(written, own=True).text)
    tokens = words(text)
    past = [words(one) for one in earlier]
    count = max(1, len(tokens))
    # The first apology of a dialogue is free; each earlier one makes the next ones dearer.
    sorry = apologies(text)
    sorry_before = sum(apologies(one) for one in earlier)
    feelings = sum(token in FEELING_WORDS for token in tokens)
    # One ordinal ("first, ...") is ordinary speech.
    numbered = (
        len(_LIST_LINE.findall(text))
        + len(_INLINE_NUMBER.findall(text))
        + max(0, len(_ORDINAL.findall(text.lower())) - 1)
    )
    # The user's own word said back ("it was perfect") is no flattery.
    heard_words = set().union(*(words(one) for one in heard)) if heard else set()
    superlatives = sum(token in _SUPERLATIVES and token not in heard_words for token in tokens)
    strengths = {
        "repetition": _repetition(tokens),
        "echo": max(ramp(overlap(tokens, past, 3), 0.25, 0.75), ramp(overlap(tokens, past, 2), 0.45, 0.9)),
        "formula": _formula(tokens, past),
        "apologies": ramp(sorry - 1 + 0.34 * min(sorry_before, 3), 0.3, 2.0) if sorry else 0.0,
        "feeling_density": ramp(feelings / count, 0.24, 0.50) * ramp(count, 3, 8),
        "superlatives": ramp(superlatives, 1.0, 4.0),
        # Of the reply itself: `plain` takes off the accents, which speak for another language.
        "foreign": _foreign(reply, tokens),
        "word_salad": _word_salad(tokens),
        "symbols": ramp(_symbol_share(written), 0.015, 0.12),
        "listing": max(ramp(numbered, 1.5, 4.0), ramp(len(_MARKUP.findall(shown)), 0.5, 3.0)),
        "questions": ramp(text.count("?"), 2, 5),
        "over_length": ramp(count, SPOKEN_WORDS, LONG_WORDS),
        # A reply that was cut exactly at the end of a sentence misses nothing that the user could notice.
        "truncated": float(truncated and not text.rstrip().endswith((".", "!", "?", '"', "'"))),
        "unaddressed": _unaddressed(text, tokens) if tokens else 0.0,
        "score_talk": float(bool(_SCORE.search(text.lower()))),
        "copied": ramp(overlap(tokens, [words(one) for one in heard], 4), 0.25, 0.7),
        "too_short": 1.0 - ramp(count, 2, 8),
    }
    return {name: round(value, 4) for name, value in strengths.items()}
