"""The persona sampler: epochs without replacement, and exact continuation from a saved state."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.data.personas import load_split
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.errors import DataError

PERSONAS = load_split("bank", "evaluation")[:7]


@given(
    seed=st.integers(0, 2**32),
    draws=st.lists(st.integers(0, 9), max_size=8),
    later=st.lists(st.integers(0, 9), max_size=6),
)
def test_a_restored_sampler_goes_on_exactly(seed, draws, later):
    sampler = PersonaSampler(PERSONAS, seed)
    for n in draws:
        sampler.next(n)
    state = json.loads(json.dumps(sampler.state()))
    resumed = PersonaSampler(PERSONAS, seed=seed + 1)
    resumed.restore(state)
    assert [resumed.next(n) for n in later] == [sampler.next(n) for n in later]
    assert resumed.state() == sampler.state()


@given(seed=st.integers(0, 2**32), draws=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_every_epoch_draws_everyone_once(seed, draws):
    sampler = PersonaSampler(PERSONAS, seed)
    drawn = [persona for n in draws for persona in sampler.next(n)]
    assert len(drawn) == sum(draws)
    for start in range(0, len(drawn) - len(PERSONAS) + 1, len(PERSONAS)):
        assert {p.id for p in drawn[start : start + len(PERSONAS)]} == {p.id for p in PERSONAS}


def test_the_order_is_fixed_by_the_seed_and_differs_between_epochs():
    personas = load_split("bank", "train")
    orders = [[p.id for p in PersonaSampler(personas, seed).next(480)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:240] != orders[0][240:]
    assert orders[0][:3] == ["train-012", "train-151", "train-032"]


def test_a_state_for_other_personas_is_refused():
    state = PersonaSampler(PERSONAS, 0).state()
    for others in (
        PERSONAS[1:],
        PERSONAS[::-1],
        [replace(PERSONAS[0], want="something else"), *PERSONAS[1:]],
    ):
        with pytest.raises(DataError, match="other personas"):
            PersonaSampler(others, 0).restore(state)


def test_no_persona_is_refused():
    with pytest.raises(DataError, match="no persona"):
        PersonaSampler([], 0)
