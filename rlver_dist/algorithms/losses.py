"""Per-token losses of policy and critic. Each function gives one micro-batch's term; the terms of all
micro-batches and ranks sum to the loss of an update.

Every entry is a trained token: rows are scored at those alone, so that no loss needs a mask. A micro-batch
may have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlver_dist.algorithms import kl
from rlver_dist.algorithms.reduce import global_mean, require_same_shape

TokenSums = dict[str, tuple[float, float]]
"""Metric name to (sum, number of tokens) over a micro-batch's trained tokens; pooled by adding both, then
dividing."""


def truncated_importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Token weights min(exp(old_logprob - rollout_logprob), cap) that correct for an engine whose numbers
    differ from the learner's.

    Truncated importance sampling (Ionides 2008; for rollout engines: Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training").

    Args:
        old_logprobs: `[S]` the learner's log-probs before the update, nats.
        rollout_logprobs: `[S]` the engine's, as sampled.
        cap: largest weight; 0 switches the correction off, so that every token weighs 1.

    Returns:
        `[S]` float32 without gradient.

    Raises:
        ValueError: shapes differ, or the cap is negative.
    """
    require_same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    if cap < 0:
        raise ValueError(f"cap={cap}: use 0 (off) or a positive number")
    if cap == 0:
        return torch.ones_like(rollout_logprobs, dtype=torch.float32)
    # In float32: bfloat16 would round a weight near 1 to steps of 0.004 to 0.008.
    return (old_logprobs.detach().float() - rollout_logprobs.float()).exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
    global_count: int,
) -> tuple[Tensor, TokenSums]:
    """Clipped surrogate: -sum(weight * min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)) /
    global_count.

    PPO, arXiv:1707.06347, eq. 7, with the two clip ranges of DAPO, arXiv:2503.14476, section 3.1 (equal
    ranges give PPO's).

    Args:
        logprobs: `[S]` log-probs with gradient, nats.
        old_logprobs: `[S]` before the update; no gradient flows into them, so passing `logprobs` itself gives
            ratio 1.
        advantages: `[S]`.
        weights: `[S]` importance weights.
        clip_low: lower clip range.
        clip_high: upper clip range.
        global_count: trained tokens of the whole update, over all micro-batches and ranks.

    Returns:
        Scalar loss of the micro-batch, and the sums of `clip_fraction` (tokens whose gradient the clip cut
            off), `ratio` and `tis_weight`.

    Raises:
        ValueError: shapes differ, or the count is not positive.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, weights=weights)
    ratio = (logprobs - old_logprobs.detach()).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -global_mean(weights * torch.minimum(unclipped, clipped), global_count)
    with torch.no_grad():
        # The minimum takes the clipped term, which has no gradient, exactly where it is the smaller one.
        # One tensor, so that an accelerator is waited for once and not three times.
        rows = torch.stack([(clipped < unclipped).float(), ratio, weights])
        clip_sum, ratio_sum, weight_sum = rows.sum(dim=1).tolist()
    count = float(len(logprobs))
    return loss, {
        "clip_fraction": (clip_sum, count),
        "ratio": (ratio_sum, count),
        "tis_weight": (weight_sum, count),
    }


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, kind: str, global_count: int) -> Tensor:
    """The micro-batch's term of the mean KL(policy || reference) over trained tokens.

    Which gradient each kind has is explained at `kl.estimate`; as a loss only `k2` has that of the reverse
    KL.

    Args:
        logprobs: `[S]` log-probs with gradient, nats.
        ref_logprobs: `[S]` the reference's.
        kind: `k1`, `k2` or `k3`.
        global_count: trained tokens of the whole update, over all micro-batches and ranks.

    Returns:
        Scalar, nats.

    Raises:
        ValueError: unknown kind, shapes differ, or the count is not positive.
    """
    return global_mean(kl.estimate(logprobs, ref_logprobs, kind), global_count)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float, global_count: int
) -> tuple[Tensor, TokenSums]:
    """Critic loss: sum(0.5 * max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2)) / global_count.

    The clipped form of OpenAI Baselines' PPO2, which the original uses (RLVER,
    verl/trainer/ppo/core_algos.py): a value that has left the range around its old one on the way to the
    return gets no gradient; one that left it the other way is still pulled back.

    Args:
        values: `[S]` with gradient, in reward.
        old_values: `[S]` before the update, those that the advantages come from; no gradient flows into them.
        returns: `[S]` targets.
        clip: half the range's width, in reward; 0 means no clip, squared error alone.
        global_count: trained tokens of the whole update, over all micro-batches and ranks.

    Returns:
        Scalar loss of the micro-batch, and the sum of `clip_fraction` (tokens whose gradient the clip cut
            off).

    Raises:
        ValueError: shapes differ, the clip is negative, or the count is not positive.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    if clip < 0:
        raise ValueError(f"clip={clip}: use 0 (off) or a positive number")
    # Targets are constants, wherever they were computed.
    returns = returns.detach()
    squared = (values - returns).square()
    worst = squared
    num_clipped = 0.0
    if clip > 0:
        old_values = old_values.detach()
        clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
        worst = torch.maximum(squared, clipped)
        num_clipped = float((clipped > squared).sum())
    loss = 0.5 * global_mean(worst, global_count)
    return loss, {"clip_fraction": (num_clipped, float(len(values)))}
