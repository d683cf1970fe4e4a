"""How much work a call is, for tests that compare two amounts of it."""

import time

TIMES = 16


def grows_in_proportion(work, size):
    """Whether `work(TIMES * size)` is nearer to `TIMES` than to its square times the work of `work(size)`."""
    return _least_time(work, TIMES * size) < 4 * TIMES * _least_time(work, size)


def _least_time(work, size):
    """Seconds of this process, the least of five tries: work and not waiting."""
    taken = []
    for _ in range(5):
        start = time.process_time()
        work(size)
        taken.append(time.process_time() - start)
    return min(taken)
