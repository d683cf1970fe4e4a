"""KL estimators: values by hand, expectations and gradients against the exact KL of a small distribution; the
adapted weight."""

import math

import pytest
import torch

from rlver_dist.algorithms import kl

POLICY = torch.tensor([0.6, 0.1, -0.4, 0.3], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.1, 0.5, -0.2, 0.0], dtype=torch.float64), dim=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [math.log(2), -math.log(4)]),
        ("k2", [math.log(2) ** 2 / 2, math.log(4) ** 2 / 2]),
        ("k3", [0.5 - 1 + math.log(2), 4 - 1 - math.log(4)]),
    ],
)
def test_values_by_hand(kind: str, expected: list[float]):
    # pi = 1/2 against reference 1/4, and 1/8 against 1/2.
    logprobs, ref_logprobs = torch.tensor([0.5, 0.125]).log(), torch.tensor([0.25, 0.5]).log()
    assert kl.estimate(logprobs, ref_logprobs, kind).tolist() == pytest.approx(expected, rel=1e-6)


def test_k3_keeps_its_digits_where_the_models_nearly_agree():
    difference = torch.tensor([1e-3])
    # Series: d^2 / 2 - d^3 / 6.
    assert kl.estimate(difference, torch.zeros(1), "k3").item() == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)


def expectation(kind: str, logits: torch.Tensor) -> torch.Tensor:
    """Mean over the policy's own samples; probabilities are constants, as they are for sampled tokens."""
    logprobs = torch.log_softmax(logits, dim=0)
    return (logprobs.detach().exp() * kl.estimate(logprobs, REFERENCE, kind)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str):
    logprobs = torch.log_softmax(POLICY, dim=0)
    exact = (logprobs.exp() * (logprobs - REFERENCE)).sum()
    assert expectation(kind, POLICY).item() == pytest.approx(exact.item(), rel=1e-9)


def test_mean_gradients_are_what_the_docstring_says():
    gradients = {}
    for kind in ("k1", "k2", "k3"):
        logits = POLICY.clone().requires_grad_()
        expectation(kind, logits).backward()
        gradients[kind] = logits.grad
    logits = POLICY.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, dim=0)
    (reverse,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - REFERENCE)).sum(), logits, retain_graph=True
    )
    (forward,) = torch.autograd.grad((REFERENCE.exp() * (REFERENCE - logprobs)).sum(), logits)
    assert gradients["k1"].tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert gradients["k2"].tolist() == pytest.approx(reverse.tolist(), rel=1e-9)
    assert gradients["k3"].tolist() == pytest.approx(forward.tolist(), rel=1e-9)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="use k1, k2 or k3"):
        kl.estimate(torch.zeros(2), torch.zeros(2), "k4")
    with pytest.raises(ValueError, match="one shape"):
        kl.estimate(torch.zeros(2), torch.zeros(1), "k1")


@pytest.mark.parametrize(
    ("measured", "num_dialogues", "expected"),
    [
        (0.10, 100, 0.5),  # on target
        (0.11, 100, 0.5 * 1.01),  # 10 % above, a tenth of the horizon
        (0.09, 100, 0.5 * 0.99),
        (0.30, 100, 0.5 * 1.02),  # 200 % above counts as 20 %
        (math.inf, 100, 0.5 * 1.02),
        (0.00, 100, 0.5 * 0.98),
        (-0.50, 100, 0.5 * 0.98),
        (0.30, 1000, 0.5 * 1.2),
        (0.30, 9000, 0.5 * 1.2),  # never past the largest step
        (0.00, 9000, 0.5 * 0.8),
    ],
)
def test_the_weight_goes_up_above_the_target_and_down_below(
    measured: float, num_dialogues: int, expected: float
):
    assert kl.adapt(0.5, measured, target=0.1, horizon=1000.0, num_dialogues=num_dialogues) == pytest.approx(
        expected, rel=1e-12
    )


def test_adapting_needs_a_target_a_horizon_and_a_number():
    for measured, target, horizon in ((0.1, 0.0, 1.0), (0.1, 1.0, 0.0), (math.nan, 1.0, 1.0)):
        with pytest.raises(ValueError, match="target and horizon above 0"):
            kl.adapt(0.5, measured, target, horizon, num_dialogues=1)
