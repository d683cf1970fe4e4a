"""KL(policy || reference): estimators from tokens that the policy sampled, and a weight that holds the KL at
a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlver_dist.algorithms.reduce import require_same_shape

MAX_ERROR = 0.2
"""Largest relative error that `adapt` corrects for, above or below the target."""


def estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token KL estimate in nats (Schulman 2020, "Approximating KL divergence"); with d = logprobs -
    ref_logprobs:

    - `k1`: d. Unbiased, can be negative, high variance.
    - `k2`: d^2 / 2. Biased, low variance.
    - `k3`: exp(-d) - 1 + d. Unbiased, never negative.

    As values all three are fit for a reward penalty or a metric. As a loss term their gradients are not
    estimates of one thing (Tang & Munos 2025, arXiv:2506.09477): the gradient of `k1` is grad log pi, whose
    mean over the policy's samples is zero, so it adds noise and pulls nowhere; the gradient of `k2` is d *
    grad log pi, whose mean is the gradient of the reverse KL; the gradient of `k3` has the mean of the
    gradient of the forward KL(reference || policy), close to it while d is small. All of this holds token by
    token; how a token changes the KL of later ones is not in a loss term, only in a reward penalty.

    Args:
        logprobs: `[T]` policy log-probs of the sampled tokens, nats.
        ref_logprobs: `[T]` the reference's; no gradient flows into them.
        kind: `k1`, `k2` or `k3`.

    Returns:
        `[T]` nats; gradient flows through `logprobs` alone.

    Raises:
        ValueError: unknown kind, or shapes differ.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = logprobs - ref_logprobs.detach()
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        # expm1 keeps the digits of a small difference, where exp(-d) - 1 + d cancels.
        return torch.expm1(-difference) + difference
    raise ValueError(f"kind={kind}: use k1, k2 or k3")


def adapt(coef: float, measured: float, target: float, horizon: float, num_dialogues: int) -> float:
    """Next weight of the KL: coef * (1 + clip(measured / target - 1, -0.2, 0.2) * num_dialogues / horizon).

    Proportional control in log space (Ziegler et al., arXiv:1909.08593, section 2.2, whose K_beta is
    num_dialogues / horizon here, as in the authors' code).

    Args:
        coef: present weight.
        measured: mean KL estimate of the iteration, nats a token; may be negative (`k1`).
        target: wanted KL, nats a token.
        horizon: dialogues after which the largest step, 20 %, is taken in full; a longer iteration takes no
            larger one.
        num_dialogues: dialogues of the iteration.

    Returns:
        The weight for the next iteration, 0.8 to 1.2 times `coef`.

    Raises:
        ValueError: the target or the horizon is not positive, or the measured KL is nan.
    """
    if not (target > 0 and horizon > 0) or math.isnan(measured):
        raise ValueError(
            f"measured={measured}, target={target}, horizon={horizon}: use numbers, target and horizon "
            f"above 0"
        )
    # Clipped: one iteration with an outlying KL must not change the weight by a multiple.
    error = min(max(measured / target - 1, -MAX_ERROR), MAX_ERROR)
    return coef * (1 + error * min(num_dialogues / horizon, 1.0))
