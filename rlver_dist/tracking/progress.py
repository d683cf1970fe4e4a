"""How far a stage has come, for a terminal's bar or for a line in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REPORT_EVERY_S = 30.0
"""Seconds between two lines of a stage where the output is no terminal."""


class Stage:
    """One stage: what is done of how much, and since when. Call it to move on."""

    def __init__(
        self,
        name: str,
        total: float | None,
        unit: str,
        on_change: Callable[[Stage], None] = lambda stage: None,
    ) -> None:
        """
        Args:
            name: what is being done.
            total: steps until the end; None until somebody knows.
            unit: what a step is, in the plural, such as `turns`.
            on_change: called after each step.
        """
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.beside = ""
        self._on_change = on_change
        self._started = self._counted_since = time.monotonic()

    def __call__(self, amount: float = 1, **fields: object) -> None:
        """Count `amount` steps more, with `fields` as text beside them."""
        self.reach(self.done + amount, self.total, **fields)

    def reach(self, done: float, total: float | None, **fields: object) -> None:
        """Say that `done` of `total` steps are done. Where that begins anew, so does the rate."""
        if done < self.done or (self.total is not None and total != self.total):
            # The pace so far was of other work.
            self._counted_since = time.monotonic()
        self.done, self.total = done, total
        self.beside = "  ".join(f"{key} {value}" for key, value in fields.items())
        self._on_change(self)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at the mean rate so far; None where that cannot be said."""
        done, total = self.done, self.total
        return self._left(done, total) if done and total is not None else None

    def line(self) -> str:
        """For example `evaluation before: 96 of 320 turns, 0.8 a second, about 280 s left`."""
        # Another thread may count on meanwhile.
        done, total, unit = self.done, self.total, f" {self.unit}" if self.unit else ""
        if total is None:
            return f"{self.name}: {duration(self.elapsed_s)} so far"
        counted = f"{self.name}: {done:.0f} of {total:.0f}{unit}"
        if not done:
            return f"{counted}, {duration(self.elapsed_s)} so far"
        rate = self._rate(done)
        return (
            f"{counted}, {rate:.{0 if rate >= 10 else 2}f} a second, about "
            f"{duration(self._left(done, total))} left"
        )

    def _left(self, done: float, total: float) -> float:
        return max(total - done, 0.0) / self._rate(done)

    def _rate(self, done: float) -> float:
        # A step may be done within one tick of the clock.
        return done / max(time.monotonic() - self._counted_since, 1e-3)


@contextmanager
def reported(stage: Stage, say: Callable[[str], None], every_s: float = REPORT_EVERY_S) -> Iterator[None]:
    """Inside the block `say(stage.line())` every `every_s` seconds, from a thread: the block may keep this
    one busy."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(every_s):
            say(stage.line())

    # A daemon, so that it never keeps a process alive whose stage was left behind.
    reporter = threading.Thread(target=report, name=f"progress of {stage.name}", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def duration(seconds: float) -> str:
    """Seconds for people: `3.2 s`, `45 s`, `12 min`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
