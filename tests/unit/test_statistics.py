"""Paired bootstrap, against values worked out by hand."""

import math

import numpy as np
import pytest

from rlver_dist.evaluation.statistics import paired_bootstrap


def test_a_constant_difference_has_a_point_interval():
    assert paired_bootstrap([10.0, 40.0, 70.0], [15.0, 45.0, 75.0], 200, seed=3) == pytest.approx((5.0, 5.0))


def test_two_pairs_by_hand():
    # Resampled means are 0 (1/4), 1 (1/2), 2 (1/4): both 2.5 % tails lie inside the outer quarters.
    assert paired_bootstrap([1.0, 1.0], [1.0, 3.0], 2000, seed=1) == (0.0, 2.0)


def test_interval_is_near_the_normal_one_for_many_pairs_and_seeded():
    differences = np.random.default_rng(5).normal(3.0, 10.0, size=400)
    before = np.linspace(0, 60, 400)
    low, high = paired_bootstrap(before.tolist(), (before + differences).tolist(), 4000, seed=1)
    half = 1.96 * differences.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.1)
    assert paired_bootstrap(before.tolist(), (before + differences).tolist(), 4000, seed=1) == (low, high)
    assert paired_bootstrap(before.tolist(), (before + differences).tolist(), 4000, seed=2) != (low, high)


def test_pairs_are_kept_together():
    # Values spread over 90 points, differences over 1: an unpaired resampling would give an interval tens of
    # points wide.
    before = [float(value) for value in range(0, 90, 3)]
    low, high = paired_bootstrap(before, [value + 4 + value % 2 for value in before], 1000, seed=1)
    assert 4.0 <= low < 4.5 < high <= 5.0


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="1 values before and 2 after"):
        paired_bootstrap([1.0], [1.0, 2.0], 100, seed=1)
    with pytest.raises(ValueError, match="at least one"):
        paired_bootstrap([], [], 100, seed=1)
    with pytest.raises(ValueError, match="num_samples=0"):
        paired_bootstrap([1.0], [1.0], 0, seed=1)
