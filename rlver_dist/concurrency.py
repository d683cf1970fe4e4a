"""Concurrent calls of which one failure ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import TypeVar

Result = TypeVar("Result")


async def all_or_none(work: Iterable[Coroutine[object, None, Result]]) -> list[Result]:
    """Run all coroutines of `work` at the same time; returns their results in order.

    The first failure, or a cancellation of the caller, cancels the rest. It is raised when all of them have
    ended, so that none still runs after this call. `asyncio.gather` alone would let the rest run.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            # If the caller was cancelled, so were they. A second cancellation would interrupt their clean-up.
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def to_the_end(work: Awaitable[Result]) -> tuple[Result, asyncio.CancelledError | None]:
    """Await `work` to its end, also where this task is cancelled once meanwhile.

    Returns:
        What `work` gave, and the cancellation, which the caller has to raise when it is ready for it; None
            where there was none.

    Raises:
        asyncio.CancelledError: this task was cancelled twice, and `work` was left alone in its midst.
        Exception: whatever `work` raises.
    """
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running), None
    except asyncio.CancelledError as cancellation:
        return await asyncio.shield(running), cancellation
