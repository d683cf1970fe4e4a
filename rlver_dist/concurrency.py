"""Work that stands or falls together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results of all of `work` at once, in order.

    The first failure, or a cancellation of the caller, cancels the rest and is raised when all of it has
    ended, so that nothing goes on behind the caller's back; `asyncio.gather` alone lets the rest run.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            # Where the caller was cancelled they are already; once more would break off their tidying up.
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
