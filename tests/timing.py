"""How long a test may wait before it counts as hanging on a machine of this speed."""

import functools
import hashlib
import time

REFERENCE_S = 0.025
"""Seconds of `_fixed_work` on cores on which limits hold as they stand; two AVX2 cores of 2.45 GHz take
0.063."""


def hang_limit(seconds):
    """`seconds`, which are many times what the work takes on fast cores, for this machine: never less, more
    where it is slower.

    A limit tells a hang from work, so it scales with the machine's speed, measured once a session.
    """
    return seconds * max(1.0, slowness())


@functools.cache
def slowness():
    """Time of a fixed amount of work here over `REFERENCE_S`."""
    return min(_seconds(_fixed_work) for _ in range(3)) / REFERENCE_S


def _fixed_work():
    total = 0
    for number in range(600_000):
        total += number % 7
    hashlib.sha256(b"x" * 20_000_000).digest()
    return total


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
