"""Statistics of paired evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
"""Coverage of the bootstrap interval."""


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], num_samples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `after - before` over pairs (Efron & Tibshirani 1993, chapter
    13).

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
        raise ValueError(
            f"{len(before)} values before and {len(after)} after: pairs are needed, at least one"
        )
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: use at least 1")
    # Pairs are drawn, not values: both values of a persona depend on how hard it is to please.
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(differences), size=(num_samples, len(differences)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences[drawn].mean(axis=1), (tail, 1 - tail))
    return float(low), float(high)
