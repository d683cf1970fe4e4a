"""Guards against reward hacking: what is suspicious about a dialogue's replies, whatever judged them, and
what that takes off the reward.

Measures of one dialogue, each 0 where all is well; a "gram" is a run of `GRAM` words of one reply (a shorter
reply is one gram), a word is lower-cased, and a Chinese, Japanese or Korean character is a word:

    repetition  mean over its grams of the share of other personas' dialogues that hold the gram. A mean over
                pairs of dialogues, it does not grow with their number, as the share of grams found anywhere
                else would.
    loops       share of its grams that one of its replies has held before (1 - distinct grams / grams, as
                distinct-n of Li et al., arXiv:1510.03055, section 5.1)
    redundancy  1 - zlib bytes / UTF-8 bytes of its replies, where they are `LEAST_BYTES` or more; catches
                loops of characters and near repetitions
    non_words   share of words and symbols that no language has: a letter four times running, letters of two
                alphabets in one word, longer than `LONGEST_WORD`, five or more Latin letters without a vowel,
                or no letter, digit or common punctuation
    length      words a reply

Every measure takes time linear in the text, and none depends on the order of the dialogues.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlver_dist.config.guards import GuardConfig, GuardsConfig
from rlver_dist.dialogue import Dialogue
from rlver_dist.text import ngrams

GRAM = 4
"""Words of a gram."""
LEAST_BYTES = 400
"""Shorter texts compress too little to say anything."""
LONGEST_WORD = 30
"""Letters of the longest word that counts as one."""

_EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W_{_EAST_ASIAN}]+(?:'[^\W_{_EAST_ASIAN}]+)*")
_STUTTER = re.compile(r"([^\W\d_])\1{3}")
_VOWEL = re.compile("[aeiouy]")
_SYMBOL_CATEGORIES = frozenset({"So", "Sk", "Sm", "Cc", "Cf", "Cs", "Co", "Cn"})
_PLAIN_SYMBOLS = frozenset("+=<>~^`|\u200d")


@dataclass(kw_only=True, slots=True)
class Guarded:
    """Rewards before and after the guards.

    Attributes:
        before: reward (0 to 1) by dialogue id.
        after: what is paid, by dialogue id: from 0 to `before`.
        measures: for each guard, on or off, its measure by dialogue id.
        flagged: for each guard, the ids of the dialogues whose measure is beyond its `start`.
    """

    before: dict[str, float]
    after: dict[str, float]
    measures: dict[str, dict[str, float]]
    flagged: dict[str, set[str]]


def guard_rewards(
    dialogues: Sequence[Dialogue], rewards: Mapping[str, float], guards: GuardsConfig
) -> Guarded:
    """Measure all dialogues of an iteration, and take off their rewards the penalties of the guards that are
    on, `guards.max_penalty` at most.

    Args:
        dialogues: in any order, infrastructure failures left out.
        rewards: 0 to 1 by dialogue id.
        guards: bounds and penalties.

    Returns:
        Rewards before and after, and what was measured, of every guard and dialogue.

    Raises:
        KeyError: a dialogue has no reward.
    """
    # Guards that take nothing off are measured too: their metrics show whether they should.
    measures = measure(dialogues)
    options = guards.by_name()
    taken = {
        dialogue.id: min(
            guards.max_penalty,
            sum(penalty(measures[name][dialogue.id], guard) for name, guard in options.items()),
        )
        for dialogue in dialogues
    }
    return Guarded(
        before={dialogue.id: rewards[dialogue.id] for dialogue in dialogues},
        after={dialogue.id: max(0.0, rewards[dialogue.id] - taken[dialogue.id]) for dialogue in dialogues},
        measures=measures,
        flagged={
            name: {id for id, value in measures[name].items() if value > guard.start}
            for name, guard in options.items()
        },
    )


def penalty(value: float, guard: GuardConfig) -> float:
    """Reward that `guard` takes off at a measure of `value`: 0 up to its `start`, then growing evenly to its
    `penalty` at `full`."""
    return guard.penalty * min(1.0, max(0.0, (value - guard.start) / (guard.full - guard.start)))


def measure(dialogues: Sequence[Dialogue]) -> dict[str, dict[str, float]]:
    """Every measure of every dialogue, as defined at the head of this module.

    Args:
        dialogues: all of an iteration: `repetition` compares them with each other.

    Returns:
        By guard and dialogue id.
    """
    replies = {dialogue.id: [turn.reply for turn in dialogue.turns if turn.reply] for dialogue in dialogues}
    spoken = {id: [words(reply) for reply in texts] for id, texts in replies.items()}
    # Reply by reply: a run of words over the end of a reply was never said.
    own_grams = {id: [gram for tokens in said for gram in grams(tokens)] for id, said in spoken.items()}
    return {
        "repetition": _repetition({dialogue.id: dialogue.persona_id for dialogue in dialogues}, own_grams),
        "loops": {id: 1.0 - len(set(own)) / len(own) if own else 0.0 for id, own in own_grams.items()},
        "redundancy": {id: redundancy("\n".join(texts)) for id, texts in replies.items()},
        "non_words": {id: non_words("\n".join(texts)) for id, texts in replies.items()},
        "length": {id: sum(map(len, said)) / len(said) if said else 0.0 for id, said in spoken.items()},
    }


def words(text: str) -> list[str]:
    """Lower-case words of `text` in order; a Chinese, Japanese or Korean character is one."""
    return _WORD.findall(text.replace("\u2019", "'").lower())


def grams(tokens: list[str]) -> list[tuple[str, ...]]:
    """All runs of `GRAM` words, in order; fewer words are one gram, none are none."""
    if len(tokens) < GRAM:
        return [tuple(tokens)] if tokens else []
    return ngrams(tokens, GRAM)


def _repetition(
    personas: Mapping[str, str], own_grams: Mapping[str, list[tuple[str, ...]]]
) -> dict[str, float]:
    """Of persona and grams of each dialogue; 0 where all dialogues are of one persona."""
    everywhere = _dialogues_with(own_grams.values())
    sizes = Counter(personas.values())
    members: dict[str, list[str]] = {}
    for id, persona in personas.items():
        members.setdefault(persona, []).append(id)
    repetition: dict[str, float] = {}
    for persona, ids in members.items():
        # Dialogues with one persona speak of the same facts, so that the same words in them are no sign of a
        # phrase that every user hears.
        with_persona = _dialogues_with(own_grams[id] for id in ids)
        others = len(personas) - sizes[persona]
        for id in ids:
            found = sum(everywhere[gram] - with_persona[gram] for gram in own_grams[id])
            pairs = others * len(own_grams[id])
            repetition[id] = found / pairs if pairs else 0.0
    return repetition


def _dialogues_with(dialogues: Iterable[list[tuple[str, ...]]]) -> Counter[tuple[str, ...]]:
    """In how many of the dialogues, given as their grams, each gram occurs."""
    counts: Counter[tuple[str, ...]] = Counter()
    for own_grams in dialogues:
        counts.update(set(own_grams))
    return counts


def redundancy(text: str) -> float:
    """Share (0 to 1) of the bytes of `text` that zlib saves; 0 for short texts."""
    # A reply may hold half of a surrogate pair, which plain UTF-8 refuses.
    raw = text.encode("utf-8", "surrogatepass")
    # Level 6 is named, so that the measure does not change with zlib's default.
    return max(0.0, 1.0 - len(zlib.compress(raw, 6)) / len(raw)) if len(raw) >= LEAST_BYTES else 0.0


def non_words(text: str) -> float:
    """Share (0 to 1) of words and symbols that belong to no language; 0 where there is neither."""
    symbols = sum(count for c, count in Counter(text).items() if _is_symbol(c))
    found = words(text)
    return (sum(map(_is_no_word, found)) + symbols) / max(1, len(found) + symbols)


def _is_symbol(character: str) -> bool:
    # Emoji and control characters, but not the signs that people type in messages.
    plain = character.isalnum() or character.isspace() or character in _PLAIN_SYMBOLS
    return not plain and unicodedata.category(character) in _SYMBOL_CATEGORIES


# An iteration repeats the same few thousand words again and again.
@lru_cache(maxsize=65536)
def _is_no_word(word: str) -> bool:
    if len(word) > LONGEST_WORD or _STUTTER.search(word):
        return True
    if word.isascii():
        # Shorter words without a vowel are sounds and abbreviations: hmm, pfft, tv.
        return len(word) >= 5 and word.isalpha() and not _VOWEL.search(word)
    # The first word of a letter's Unicode name is its alphabet: LATIN, CYRILLIC, GREEK ...
    return len({unicodedata.name(c, "?").split()[0] for c in word if c.isalpha()}) > 1
