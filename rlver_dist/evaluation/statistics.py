"""Statistics of paired evaluations and of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

CONFIDENCE = 0.95
"""Coverage of the bootstrap interval."""


def paired_bootstrap(before: Sequence[float], after: Sequence[float], num_samples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean of `after - before` over pairs (Efron & Tibshirani 1993, chapter 13).

    Args:
        before: one value per persona.
        after: one value per persona, in the same order.
        num_samples: resamples of the pairs.
        seed: seeds the resampling.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: no pair, different numbers of values, or `num_samples` not positive.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} values before and {len(after)} after: pairs are needed, at least one")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: use at least 1")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(differences), size=(num_samples, len(differences)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences[drawn].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct n-grams / all n-grams of a corpus (Li et al. 2016, arXiv:1510.03055), 0 where there is no n-gram.

    Words are lower-cased and split at white space; no n-gram spans two texts. The value falls as a corpus grows, so compare
    corpora of like size.
    """
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.lower().split()
        grams += zip(*(words[start:] for start in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 0.0
