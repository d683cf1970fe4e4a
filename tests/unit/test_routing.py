"""Which member gets a call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.cluster.routing import HomeRouter, Router

NAMES = [f"persona-{index}" for index in range(200)]


def test_an_idle_router_always_sends_an_affinity_to_the_same_member_in_every_process():
    homes = [Router(4).pick(name) for name in NAMES]
    assert homes == [Router(4).pick(name) for name in NAMES]
    counts = [homes.count(member) for member in range(4)]
    assert sum(counts) == 200 and min(counts) > 25
    # Pinned, since Python's own hash would differ from process to process.
    assert homes[:8] == [0, 2, 0, 1, 2, 1, 2, 2]


def test_a_death_moves_only_the_dead_members_affinities():
    router, homes = Router(4), [Router(4).pick(name) for name in NAMES]
    router.dead.add(2)
    moved = [(before, router.pick(name)) for before, name in zip(homes, NAMES, strict=True)]
    assert all(before == after for before, after in moved if before != 2)
    assert {after for before, after in moved if before == 2} == {0, 1, 3}


def test_a_crowd_of_one_affinity_spills_over_at_a_quarter_above_the_mean():
    router = Router(4)
    for _ in range(40):
        member = router.pick("persona-0")
        assert member is not None
        router.load[member] += 1
    # ceil(1.25 * 40 / 4) = 13 at most, home first.
    assert max(router.load) == 13 == router.load[Router(4).pick("persona-0")]
    assert sum(router.load) == 40


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.text(max_size=5), st.sets(st.integers(0, 7)))
def test_somebody_who_lives_is_always_found_and_never_far_above_the_mean(load, affinity, dead):
    router = Router(len(load))
    router.load, router.dead = load, {member for member in dead if member < len(load)}
    alive = [member for member in range(len(load)) if member not in router.dead]
    member = router.pick(affinity)
    if not alive:
        assert member is None
    else:
        assert member in alive and load[member] <= 1.25 * (sum(load[one] for one in alive) + 1) / len(alive)


def test_a_call_counts_while_it_runs_also_where_it_fails():
    router = Router(2)
    with pytest.raises(ValueError), router.call(1):
        assert router.load == [0, 1]
        raise ValueError
    assert router.load == [0, 0]


def test_homes_spread_over_the_least_loaded_and_are_kept_however_busy_they_get():
    router = HomeRouter(3)
    homes = {}
    for name in NAMES[:9]:
        homes[name] = member = router.pick(name)
        assert member is not None
        router.load[member] += 1
    assert router.load == [3, 3, 3]
    router.load = [50, 0, 0]
    assert {name: router.pick(name) for name in homes} == homes
    assert router.pick(NAMES[9]) == 1
    router.forget()
    assert 0 not in {router.pick(name) for name in homes}


def test_a_dead_home_is_left_for_another_one_and_nobody_moves_in():
    router = HomeRouter(3)
    assert router.pick("a") == 0
    router.load = [0, 4, 5]
    router.dead.add(0)
    # Nothing runs on the dead one, so by its load alone it would look the best.
    assert [router.pick(name) for name in ("a", "b", "c")] == [1, 1, 1]
    router.dead |= {1, 2}
    assert router.pick("a") is None and router.pick("d") is None
