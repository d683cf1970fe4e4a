"""Policy and value loss, importance weights, KL loss and entropy: numbers by hand, the same gradient however
a batch is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlver_dist.algorithms import losses
from rlver_dist.algorithms.reduce import global_mean


def test_clipped_surrogate_by_hand():
    # ratio, A, clip to [0.8, 1.3]:   1.5, 2 -> 2.6 | 0.5, 1 -> 0.5 | 0.5, -1 -> -0.8 | 1.5, -2 -> -3.0 | 1.1,
    # 1 -> 1.1
    ratios, advantages = torch.tensor([1.5, 0.5, 0.5, 1.5, 1.1]), torch.tensor([2.0, 1.0, -1.0, -2.0, 1.0])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.0])
    logprobs = (old + ratios.log()).requires_grad_()
    loss, sums = losses.policy_loss(
        logprobs, old, advantages, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5]), 0.2, 0.3, global_count=10
    )
    assert loss.item() == pytest.approx(-(2.6 + 0.5 - 0.8 - 3.0 + 0.55) / 10, rel=1e-5)
    assert sums["clip_fraction"] == (2.0, 5.0)
    assert sums["ratio"] == (pytest.approx(5.1), 5.0)
    assert sums["tis_weight"] == (4.5, 5.0)
    loss.backward()
    # Where the clip binds there is no gradient; elsewhere it is -weight * A * ratio / count.
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.05, 0.0, 0.3, -0.055], abs=1e-6)


def test_on_policy_gradient_is_minus_advantage_and_old_logprobs_get_none():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, sums = losses.policy_loss(
        logprobs, logprobs, torch.tensor([3.0, -1.0]), torch.ones(2), 0.2, 0.2, global_count=2
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.0)
    assert logprobs.grad.tolist() == pytest.approx([-1.5, 0.5])
    assert sums["clip_fraction"] == (0.0, 2.0)


def test_kl_loss_by_hand():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    # d = 0.2 and -0.5; of four trained tokens in the whole update these are two.
    reference = torch.tensor([-1.2, -1.5])
    expected = {
        "k1": ((0.2 - 0.5) / 4, [0.25, 0.25]),
        "k2": ((0.02 + 0.125) / 4, [0.05, -0.125]),
        "k3": (
            (math.exp(-0.2) - 0.8 + math.exp(0.5) - 1.5) / 4,
            [(1 - math.exp(-0.2)) / 4, (1 - math.exp(0.5)) / 4],
        ),
    }
    for kind, (value, gradient) in expected.items():
        loss = losses.kl_loss(logprobs, reference, kind, global_count=4)
        assert loss.item() == pytest.approx(value, rel=1e-5)
        assert torch.autograd.grad(loss, logprobs)[0].tolist() == pytest.approx(gradient, rel=1e-5)


def test_a_row_without_trained_tokens_adds_no_policy_loss():
    logprobs, none = torch.zeros(0, requires_grad=True), torch.zeros(0)
    weights = losses.truncated_importance_weights(none, none, cap=2.0)
    loss, sums = losses.policy_loss(logprobs, none, none, weights, 0.2, 0.2, global_count=3)
    loss = loss + losses.kl_loss(logprobs, none, "k3", global_count=3)
    loss.backward()
    assert (loss.item(), logprobs.grad.shape) == (0.0, (0,))
    assert sums == {"clip_fraction": (0.0, 0.0), "ratio": (0.0, 0.0), "tis_weight": (0.0, 0.0)}


def test_truncated_importance_weights_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    rollout = torch.tensor([-1.0 - math.log(1.5), -1.0 - math.log(4), -1.0 + math.log(4)])
    weights = losses.truncated_importance_weights(old, rollout, cap=2.0)
    assert weights.tolist() == pytest.approx([1.5, 2.0, 0.25])
    assert not weights.requires_grad
    assert losses.truncated_importance_weights(old, rollout, cap=0.0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="cap=-1"):
        losses.truncated_importance_weights(old, rollout, cap=-1.0)


def test_value_loss_by_hand():
    # value, old, return, clipped to old +- 0.5 -> larger squared error: 0.2, 0.0, 1.0 -> 0.2: 0.64, inside
    # the range | 0.9, 0.0, 1.0 -> 0.5: 0.25, left it towards the return, gradient cut off -0.9, 0.0, 1.0 ->
    # -0.5: 3.61, left it the other way | 2.0, 0.0, 0.3 -> 0.5: 2.89, past the return
    columns = torch.tensor([[0.2, 0.9, -0.9, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.3]])
    values, old, returns = (
        columns[0].clone().requires_grad_(),
        columns[1].clone().requires_grad_(),
        columns[2].clone().requires_grad_(),
    )
    loss, sums = losses.value_loss(values, old, returns, clip=0.5, global_count=8)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.25 + 3.61 + 2.89) / 8, rel=1e-6)
    assert sums == {"clip_fraction": (1.0, 4.0)}
    loss.backward()
    assert values.grad.tolist() == pytest.approx([-0.8 / 8, 0.0, -1.9 / 8, 1.7 / 8], abs=1e-6)
    assert old.grad is None and returns.grad is None


def test_value_loss_without_a_clip_is_half_the_squared_error():
    values = torch.tensor([0.9, -3.0], requires_grad=True)
    loss, sums = losses.value_loss(values, torch.zeros(2), torch.tensor([1.0, 1.0]), clip=0.0, global_count=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.01 + 16.0) / 2, rel=1e-6)
    assert values.grad.tolist() == pytest.approx([-0.05, -2.0], abs=1e-6)
    assert sums == {"clip_fraction": (0.0, 2.0)}


def test_a_row_without_trained_tokens_adds_no_value_loss():
    values = torch.zeros(0, requires_grad=True)
    loss, sums = losses.value_loss(values, torch.zeros(0), torch.zeros(0), clip=0.5, global_count=3)
    loss.backward()
    assert (loss.item(), sums, values.grad.shape) == (0.0, {"clip_fraction": (0.0, 0.0)}, (0,))


def test_shapes_and_counts_are_checked():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="one shape"):
        losses.policy_loss(ones, ones, torch.ones(1), ones, 0.2, 0.2, global_count=2)
    with pytest.raises(ValueError, match="global_count=0"):
        losses.policy_loss(ones, ones, ones, ones, 0.2, 0.2, global_count=0)
    with pytest.raises(ValueError, match="one shape"):
        losses.truncated_importance_weights(ones, torch.ones(2, 1), cap=2.0)
    with pytest.raises(ValueError, match="one shape"):
        losses.kl_loss(ones, torch.ones(2, 1), "k3", global_count=2)
    with pytest.raises(ValueError, match="one shape"):
        losses.value_loss(ones, ones, torch.ones(2, 1), clip=0.5, global_count=2)
    with pytest.raises(ValueError, match="global_count=0"):
        losses.value_loss(ones, ones, ones, clip=0.5, global_count=0)
    with pytest.raises(ValueError, match="clip=-1"):
        losses.value_loss(ones, ones, ones, clip=-1.0, global_count=2)


def total_loss(logprobs: Tensor, columns: Tensor, parts: list[list[int]]) -> Tensor:
    """Policy loss + KL loss + entropy share + value loss, summed over the parts that a batch is cut into."""
    count = len(logprobs)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        mine, (old, rollout, reference, advantages) = logprobs[part], columns[:, part]
        weights = losses.truncated_importance_weights(old, rollout, cap=1.5)
        loss, _ = losses.policy_loss(mine, old, advantages, weights, 0.2, 0.2, count)
        value_loss, _ = losses.value_loss(mine, old, advantages, 0.3, count)
        entropy = global_mean(mine.square(), count)
        total = (
            total + loss + 0.1 * losses.kl_loss(mine, reference, "k3", count) - 0.01 * entropy + value_loss
        )
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_loss_and_gradient_do_not_depend_on_the_cut(num_tokens: int, num_parts: int, seed: int, random):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(4, num_tokens, generator=generator, dtype=torch.float64) * 0.5
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for token in random.sample(range(num_tokens), num_tokens):
        parts[random.randrange(num_parts)].append(token)
    results = []
    for cut in ([list(range(num_tokens))], parts):
        logprobs = (
            torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
            * 0.5
        ).requires_grad_()
        loss = total_loss(logprobs, columns, cut)
        loss.backward()
        results.append([loss.item(), *logprobs.grad.tolist()])
    assert results[0] == pytest.approx(results[1], rel=1e-6, abs=1e-9)
