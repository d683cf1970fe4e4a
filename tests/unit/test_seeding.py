"""Seeds against values that must never change, since recorded runs were sampled with them."""

import pytest

from rlver_dist.seeding import derive_seed


def test_the_bits_are_the_first_of_the_hash_by_hand():
    """`printf 1/0 | sha256sum` begins with 18d6e1cac2a8adaf."""
    assert derive_seed(1, 0, bits=64) == 0x18D6E1CAC2A8ADAF
    assert derive_seed(1, 0, bits=63) == 0x18D6E1CAC2A8ADAF >> 1
    assert derive_seed("1/0", bits=8) == 0x18


@pytest.mark.parametrize(
    ("names", "bits", "seed"),
    [
        # A reply: dialogue seed, turn.
        ((1, 0), 63, 894933081445914327),
        # A dialogue: run seed, iteration, group, member.
        ((1, 2, 3, 4), 63, 5874660890034346311),
        # What an embedded user says next: dialogue seed, persona, messages so far.
        ((3, "train-001", 2), 64, 14907211053028130164),
        # A chat user's call: the users' seed, dialogue seed and turn, attempt; an opening has no dialogue.
        ((5, 3, 0, 0), 31, 572985703),
        ((5, "train-001", "open", 1), 31, 1194780781),
    ],
)
def test_each_caller_keeps_its_bits(names, bits, seed):
    assert derive_seed(*names, bits=bits) == seed


def test_seeds_are_distinct():
    assert len({derive_seed(seed, index) for seed in range(50) for index in range(8)}) == 400
