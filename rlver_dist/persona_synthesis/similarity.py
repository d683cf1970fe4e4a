"""Near duplicates among what has been accepted.

English texts are compared by MiniLM sentence embeddings. MiniLM reads no Chinese: scenes of RLVER's profiles
that have nothing in common come out at 0.92 to 0.98. Chinese texts are compared by their runs of two and
three characters instead.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from rlver_dist.simulator.rules.embedding import DIGITS
from rlver_dist.simulator.sentences import sentences
from rlver_dist.text import ngrams

MOST_SIMILAR = {"en": 0.88, "zh": 0.65}
"""Cosine from which on a text is a near duplicate of an accepted one. In the bank, scenes of different
situations reach 0.81 and those of one situation begin at 0.96; among RLVER's Chinese scenes the closest two
reach 0.51, and a scene that keeps half of another's sentences begins at 0.75."""
RUNS = (2, 3)
BUCKETS = 4096

Embed = Callable[[Sequence[str]], np.ndarray]
"""Sentences to `[n, d]` unit vectors."""


def english_vector(text: str, embed: Embed) -> np.ndarray:
    """`[d]` unit vector: the mean of the sentences' embeddings, so that a long text counts as a whole."""
    mean = embed(sentences(text)).mean(axis=0)
    return mean / np.linalg.norm(mean)


def chinese_vector(text: str) -> np.ndarray:
    """`[BUCKETS]` unit vector of hashed runs of characters, each weighted by 1 + ln(count)."""
    letters = "".join(character for character in text if character.isalnum())
    counts = Counter("".join(gram) for run in RUNS for gram in ngrams(letters, run))
    vector = np.zeros(BUCKETS)
    for gram, count in counts.items():
        # CRC-32, since `hash` of a string differs from process to process. A logarithm, so that a run that is
        # in every sentence does not outweigh all others.
        vector[zlib.crc32(gram.encode("utf-8")) % BUCKETS] += 1 + math.log(count)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class Index:
    """Accepted texts of one kind, by language."""

    def __init__(self, embed: Embed) -> None:
        self._embed = embed
        self._vectors: dict[str, dict[str, np.ndarray]] = {}

    def vector(self, text: str, *, language: str, name: str) -> np.ndarray:
        """Unit vector of `text` with its person's own name left out, so that another name makes no other
        text."""
        # The whole name first: its parts alone would leave a space behind.
        for part in sorted({name, *name.split()}, key=len, reverse=True):
            text = text.replace(part, "")
        return chinese_vector(text) if language == "zh" else english_vector(text, self._embed)

    def nearest(self, vector: np.ndarray, language: str) -> tuple[float, str]:
        """Cosine to the nearest accepted text of that language, and its id; (-1, "") without one."""
        # Rounded, so that the same build rejects the same texts on other machines.
        scores = [
            (round(float(known @ vector), DIGITS), identifier)
            for identifier, known in self._vectors.get(language, {}).items()
        ]
        return max(scores, default=(-1.0, ""))

    def add(self, identifier: str, vector: np.ndarray, language: str) -> None:
        """Accept a text."""
        self._vectors.setdefault(language, {})[identifier] = vector

    def closest(
        self, language: str, *, of: Callable[[str], bool], among: Callable[[str], bool]
    ) -> list[float]:
        """For each accepted text that `of` takes, by id, the cosine to the nearest other one that `among`
        takes."""
        known = self._vectors.get(language, {})
        others = [identifier for identifier in known if among(identifier)]
        if not others:
            return []
        stacked = np.stack([known[identifier] for identifier in others])
        found = []
        for own in filter(of, known):
            scores = [
                score for other, score in zip(others, stacked @ known[own], strict=True) if other != own
            ]
            found += [round(float(max(scores)), DIGITS)] if scores else []
        return found
