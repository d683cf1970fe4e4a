"""GRPO advantages and KL in the reward, against numbers worked out by hand."""

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
    assert result.tolist() == pytest.approx([-0.5 / (1 / math.sqrt(2) + 1), 0.5 / (1 / math.sqrt(2) + 1)], rel=1e-6)


def test_without_std_rewards_are_only_centred():
    result = advantages.grpo(torch.tensor([0.1, 0.5, 1.0, 0.0]), torch.tensor([7, 7, 3, 3]), normalize_by_std=False)
    assert result.tolist() == pytest.approx([-0.2, 0.2, 0.5, -0.5])


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
        values = advantages.grpo(torch.tensor([reward + offset for _, reward in ordered]), [group for group, _ in ordered], True)
        return sorted((group, reward, value) for (group, reward), value in zip(ordered, values.tolist(), strict=True))

    for one, other in zip(by_row(rows, 0.0), by_row(shuffled, float(shift)), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-5)
    totals: dict[str, float] = {}
    for group, _, value in by_row(rows, 0.0):
        totals[group] = totals.get(group, 0.0) + value
    assert list(totals.values()) == pytest.approx([0.0] * len(totals), abs=1e-5)


def test_kl_is_taken_off_the_reward():
    result = advantages.kl_penalised_rewards(torch.tensor([0.5, 0.8]), torch.tensor([2.0, -1.0]), coef=0.1)
    assert result.tolist() == pytest.approx([0.3, 0.9])
    with pytest.raises(ValueError, match="one shape"):
        advantages.kl_penalised_rewards(torch.zeros(2), torch.zeros(1), coef=0.1)
