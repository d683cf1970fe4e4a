"""GRPO advantages, generalised advantage estimation and whitening, against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_dist.algorithms import advantages


def test_grpo_is_centred_and_divided_by_the_sample_std_of_the_group():
    rewards = torch.tensor([0.2, 0.9, 0.4, 0.5, 0.6, 0.7])
    result = advantages.grpo(rewards, ["a", "b", "a", "b", "a", "b"], normalize_by_std=True)
    std_a = math.sqrt((0.2**2 + 0.2**2) / 2)  # 0.2, 0.4, 0.6 about 0.4
    std_b = math.sqrt((0.2**2 + 0.2**2) / 2)  # 0.9, 0.5, 0.7 about 0.7
    expected = [-0.2 / std_a, 0.2 / std_b, 0.0, -0.2 / std_b, 0.2 / std_a, 0.0]
    assert result.tolist() == pytest.approx(expected, abs=1e-4)
    assert result.dtype == torch.float32


def test_std_epsilon_is_the_originals():
    # Rewards 1e-6 apart: std 1e-6 / sqrt 2, so the denominator is (1 / sqrt 2 + 1) * 1e-6.
    rewards = torch.tensor([0.0, 1e-6], dtype=torch.float64)
    result = advantages.grpo(rewards, [0, 0], normalize_by_std=True)
    assert result.tolist() == pytest.approx(
        [-0.5 / (1 / math.sqrt(2) + 1), 0.5 / (1 / math.sqrt(2) + 1)], rel=1e-6
    )


def test_without_std_rewards_are_only_centred():
    result = advantages.grpo(torch.tensor([0.1, 0.5, 1.0, 0.0]), [7, 7, 3, 3], normalize_by_std=False)
    assert result.tolist() == pytest.approx([-0.2, 0.2, 0.5, -0.5])


def test_turns_are_centred_by_number_and_scaled_by_group():
    rewards = torch.tensor([0.1, 0.5, 0.9, 0.4, 0.6, 0.7], dtype=torch.float64)
    given = rewards.clone()
    result = advantages.grpo(rewards, ["g"] * 6, normalize_by_std=True, turns=[0, 0, 0, 1, 1, 2])
    # Distances -0.4, 0, 0.4 and -0.1, 0.1: squares 0.34 over 2 + 1 degrees of freedom; the third turn stands
    # alone.
    scale = math.sqrt(0.34 / 3)
    assert result.tolist() == pytest.approx(
        [-0.4 / scale, 0, 0.4 / scale, -0.1 / scale, 0.1 / scale, 0], abs=1e-4
    )
    assert torch.equal(rewards, given)
    # All stand alone: nothing to learn.
    assert advantages.grpo(rewards[:2], ["g", "g"], normalize_by_std=True, turns=[0, 1]).tolist() == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("reward", [0.3, 0.1, 0.7])
@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_equal_rewards_give_no_advantage(reward: float, size: int):
    result = advantages.grpo(torch.full((size,), reward), ["g"] * size, normalize_by_std=True)
    assert result.tolist() == pytest.approx([0.0] * size, abs=1e-8)


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="'b' has one dialogue"):
        advantages.grpo(torch.tensor([0.1, 0.2, 0.3]), ["a", "b", "a"], normalize_by_std=True)


def test_lengths_must_fit():
    with pytest.raises(ValueError, match="do not fit 1 group ids"):
        advantages.grpo(torch.tensor([0.1, 0.2]), ["a"], normalize_by_std=True)


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 100), min_size=2, max_size=5), min_size=1, max_size=4),
    shift=st.integers(-50, 50),
    random=st.randoms(use_true_random=False),
)
def test_advantages_ignore_order_and_shift_and_sum_to_zero(groups: list[list[int]], shift: int, random):
    rows = [(f"g{number}", float(reward)) for number, rewards in enumerate(groups) for reward in rewards]
    shuffled = random.sample(rows, len(rows))

    def by_row(ordered: list[tuple[str, float]], offset: float) -> list[tuple[str, float, float]]:
        values = advantages.grpo(
            torch.tensor([reward + offset for _, reward in ordered]), [group for group, _ in ordered], True
        )
        return sorted(
            (group, reward, value) for (group, reward), value in zip(ordered, values.tolist(), strict=True)
        )

    for one, other in zip(by_row(rows, 0.0), by_row(shuffled, float(shift)), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-5)
    totals: dict[str, float] = {}
    for group, _, value in by_row(rows, 0.0):
        totals[group] = totals.get(group, 0.0) + value
    assert list(totals.values()) == pytest.approx([0.0] * len(totals), abs=1e-5)


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        # Rewards 0, 0, 1 and values 0.5, 0.2, 0.6: the deltas at gamma 1 are -0.3, 0.4, 0.4.
        (1.0, 1.0, [0.5, 0.8, 0.4]),
        (1.0, 0.5, [-0.3 + 0.5 * 0.6, 0.4 + 0.5 * 0.4, 0.4]),
        (1.0, 0.0, [-0.3, 0.4, 0.4]),
        # At gamma 0.5 they are -0.4, 0.1, 0.4.
        (0.5, 1.0, [-0.4 + 0.5 * 0.3, 0.1 + 0.5 * 0.4, 0.4]),
        (0.5, 0.5, [-0.4 + 0.25 * 0.2, 0.1 + 0.25 * 0.4, 0.4]),
        (0.0, 0.9, [-0.5, -0.2, 0.4]),
    ],
)
def test_gae_by_hand(gamma: float, lam: float, expected: list[float]):
    values = torch.tensor([0.5, 0.2, 0.6])
    result, returns = advantages.gae(torch.tensor([0.0, 0.0, 1.0]), values, gamma, lam)
    assert result.tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.tolist() == pytest.approx(
        [a + v for a, v in zip(expected, values.tolist(), strict=True)], abs=1e-6
    )
    assert result.dtype == returns.dtype == torch.float32


def test_gae_takes_rewards_on_any_token_and_a_dialogue_of_one():
    # Deltas: -0.1 + 0.2 - 0.4 = -0.3 and 0.7 - 0.2 = 0.5.
    result, _ = advantages.gae(torch.tensor([-0.1, 0.7]), torch.tensor([0.4, 0.2]), 1.0, 0.5)
    assert result.tolist() == pytest.approx([-0.05, 0.5])
    result, returns = advantages.gae(torch.tensor([0.7]), torch.tensor([0.2]), 0.3, 0.3)
    assert (result.tolist(), returns.tolist()) == (pytest.approx([0.5]), pytest.approx([0.7]))


NUMBERS = st.floats(-2, 2, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_its_definition(steps: list[tuple[float, float]], gamma: float, lam: float):
    rewards, values = (torch.tensor(column) for column in zip(*steps, strict=True))
    after = [*values.tolist()[1:], 0.0]
    deltas = [reward + gamma * later - value for (reward, value), later in zip(steps, after, strict=True)]
    expected = [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]
    result, returns = advantages.gae(rewards, values, gamma, lam)
    assert result.tolist() == pytest.approx(expected, abs=1e-5)
    assert returns.tolist() == pytest.approx((result + values).tolist(), abs=1e-5)


def test_gae_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one shape"):
        advantages.gae(torch.zeros(2), torch.zeros(3), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(1, 2\): use one number a trained token"):
        advantages.gae(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, 1.0)


def test_whitening_by_hand():
    # About the mean 2: -1, -1, -1, 3; variance (1 + 1 + 1 + 9) / 4 = 3.
    result = advantages.whiten(torch.tensor([1.0, 1.0, 1.0, 5.0]))
    assert result.tolist() == pytest.approx([-1 / math.sqrt(3)] * 3 + [math.sqrt(3)])
    assert result.dtype == torch.float32
    # A variance of 1e-8 meets the epsilon: 1e-4 / sqrt(2e-8).
    assert advantages.whiten(torch.tensor([-1e-4, 1e-4])).tolist() == pytest.approx(
        [-math.sqrt(0.5), math.sqrt(0.5)]
    )


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=50).filter(
        lambda values: max(values) - min(values) > 0.1
    )
)
def test_whitened_values_have_mean_0_and_deviation_1_and_keep_their_order(values: list[float]):
    result = advantages.whiten(torch.tensor(values))
    assert result.double().mean().item() == pytest.approx(0.0, abs=1e-5)
    assert result.double().std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert result[torch.tensor(values).argsort()].diff().min().item() >= 0


@pytest.mark.parametrize("values", [[0.7], [0.1] * 3, [0.3] * 1000])
def test_equal_values_whiten_to_nothing(values: list[float]):
    assert advantages.whiten(torch.tensor(values)).tolist() == pytest.approx([0.0] * len(values), abs=1e-8)


@pytest.mark.parametrize("shape", [(0,), (1, 2)])
def test_whitening_refuses_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="flat tensor of at least one"):
        advantages.whiten(torch.zeros(shape))
