"""Work that stands or falls together."""

import asyncio

import pytest

from rlver_dist.concurrency import all_or_none


def test_results_come_in_the_order_of_the_work():
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    assert asyncio.run(all_or_none(map(after, (0.02, 0.0, 0.01)))) == [0.02, 0.0, 0.01]
    assert asyncio.run(all_or_none([])) == []


@pytest.mark.parametrize("by", ["failure", "caller"])
def test_nothing_goes_on_behind_the_caller(by: str):
    events: list[str] = []

    async def slow(tidying_s: float) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(tidying_s)
            events.append("tidied up")

    async def fail() -> None:
        await asyncio.sleep(0.01)
        if by == "failure":
            raise ValueError("no")

    async def scenario() -> None:
        work = asyncio.create_task(all_or_none([slow(0.0), fail(), slow(0.05)]))
        await asyncio.sleep(0.02 if by == "caller" else 0)
        if by == "caller":
            work.cancel()
        with pytest.raises(ValueError if by == "failure" else asyncio.CancelledError):
            await work
        events.append("raised")

    asyncio.run(scenario())
    assert events == ["tidied up", "tidied up", "raised"]
