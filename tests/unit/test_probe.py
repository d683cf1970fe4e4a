"""The check after a weight sync: limits of both precisions, by hand."""

import math

import pytest

from rlver_dist.config.enums import Precision
from rlver_dist.errors import WeightSyncError
from rlver_dist.rollout.probe import compare_logprobs


def compare(engine: list[float], dtype: Precision):
    return compare_logprobs([-1.0, -2.0], engine, dtype, engine_index=3, step=17)


def test_differences_by_hand() -> None:
    result = compare([-1.05, -2.13], Precision.bfloat16)
    assert (result.mean_abs, result.max_abs) == (pytest.approx(0.09), pytest.approx(0.13))


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ([-1.0, -2.0002], Precision.float32),
        ([-1.0, -2.21], Precision.bfloat16),
        ([-1.0, math.nan], Precision.bfloat16),
        ([math.nan, -2.0], Precision.float32),
        ([-1.0], Precision.float32),
    ],
)
def test_refused_with_engine_and_step(engine: list[float], dtype: Precision) -> None:
    with pytest.raises(WeightSyncError, match="step 17, engine 3"):
        compare(engine, dtype)
