"""The check after every weight sync: learner and engines have to give a fixed prompt the same log-probs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlver_dist.config.enums import Precision
from rlver_dist.errors import WeightMismatchError

MAX_ABS_FLOAT32 = 1e-4
"""Largest difference of one log-prob in nats; two exact float32 implementations differ by about 1e-6."""
MEAN_ABS_BFLOAT16 = 0.1
"""Mean absolute difference in nats; two correct bfloat16 implementations differ by about 0.05."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ProbeResult:
    """Difference of the log-probs, in nats."""

    mean_abs: float
    max_abs: float


def compare_logprobs(
    learner: Sequence[float], engine: Sequence[float], dtype: Precision, *, engine_index: int, step: int
) -> ProbeResult:
    """Compare the log-probs of one fixed token sequence under the learner and under one engine.

    Args:
        learner: `[L]` log-probs in nats under the learner.
        engine: `[L]` those under the engine.
        dtype: format that both compute in; decides what difference is allowed.
        engine_index: which engine, for errors.
        step: policy version that was synced, for errors.

    Returns:
        Mean and largest absolute difference.

    Raises:
        WeightMismatchError: they differ in length, are not finite, or differ by more than the precision
            allows
            (float32: every one by at most 1e-4; bfloat16: by at most 0.1 on average).
    """
    where = f"weight sync, step {step}, engine {engine_index}"
    if len(learner) != len(engine) or not learner:
        raise WeightMismatchError(
            f"{where}: the learner scored {len(learner)} probe tokens, the engine {len(engine)}"
        )
    gaps = [abs(ours - theirs) for ours, theirs in zip(learner, engine, strict=True)]
    result = ProbeResult(mean_abs=sum(gaps) / len(gaps), max_abs=max(gaps))
    # In bfloat16 the largest difference of two correct implementations varies too much to have a bound that
    # still catches wrong weights; the mean does not.
    if dtype is Precision.float32:
        name = "largest"
        measured = result.max_abs
        limit = MAX_ABS_FLOAT32
    else:
        name = "mean"
        measured = result.mean_abs
        limit = MEAN_ABS_BFLOAT16
    # A comparison with nan is False: without the first condition an engine of nan would pass.
    if not all(math.isfinite(gap) for gap in gaps) or measured > limit:
        raise WeightMismatchError(
            f"{where}: log-probs of the probe differ from the learner's by {result.mean_abs:.3g} nats on "
            f"average and "
            f"{result.max_abs:.3g} at most; the {name} may be {limit:g} in {dtype.value}, so the engine "
            f"does not hold the learner's weights"
        )
    return result
