"""Estimators of KL(policy || reference) from tokens that the policy sampled (Schulman 2020, "Approximating KL divergence")."""

from __future__ import annotations

import torch
from torch import Tensor

from rlver_dist.algorithms.reduce import require_same_shape


def estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token KL estimate in nats; with d = logprobs - ref_logprobs:

    - `k1`: d. Unbiased, can be negative, high variance.
    - `k2`: d^2 / 2. Biased, low variance.
    - `k3`: exp(-d) - 1 + d. Unbiased, never negative.

    As values all three are fit for a reward penalty or a metric. As a loss term their gradients are not estimates of one thing
    (Tang & Munos 2025, arXiv:2506.09477): the gradient of `k1` is grad log pi, whose mean over the policy's samples is zero, so
    it adds noise and pulls nowhere; the gradient of `k2` is d * grad log pi, whose mean is the gradient of the reverse KL; the
    gradient of `k3` has the mean of the gradient of the forward KL(reference || policy), close to it while d is small. All of this
    holds token by token; how a token changes the KL of later ones is not in a loss term, only in a reward penalty.

    Args:
        logprobs: `[T]` policy log-probs of the sampled tokens, nats.
        ref_logprobs: `[T]` the reference's; no gradient flows into them.
        kind: `k1`, `k2` or `k3`.

    Returns:
        `[T]`.

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
