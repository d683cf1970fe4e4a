"""Where calls go over members that die or are given up; the members are stand-ins, so no cluster runs."""

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from rlver_dist.cluster import pools
from rlver_dist.cluster.pools import EnginePool
from rlver_dist.errors import BoundaryError, GoneError
from rlver_dist.rollout.collector import GenerateRequest


class StandIn:
    """Stands where an engine's handle stands: `generate.remote` gives a task, as Ray gives a reference."""

    def __init__(self, name: int, fail: Callable[[], Exception] | None = None) -> None:
        self.name, self.fail = name, fail
        self.calls = 0
        self.generate = self

    def remote(self, request: GenerateRequest) -> asyncio.Task:
        self.calls += 1
        return asyncio.ensure_future(self._answer(request))

    async def _answer(self, request: GenerateRequest) -> int:
        await asyncio.sleep(60 if request.dialogue_id == "slow" else 0)
        if self.fail is not None:
            raise self.fail()
        return self.name


def ask(dialogue: str, turn: int = 0) -> GenerateRequest:
    return GenerateRequest(
        dialogue_id=dialogue, turn_index=turn, prompt_ids=[1], max_tokens=1, temperature=1.0, seed=0
    )


def gone() -> RayTaskError:
    return RayTaskError("generate", "a traceback", GoneError("vLLM engine: its process died"))


@pytest.mark.parametrize("death", [RayActorError, gone])
def test_a_dead_rollout_engine_costs_one_try_and_gets_no_more_dialogues(death):
    async def scenario():
        engines = [StandIn(0, death), StandIn(1), StandIn(2)]
        pool = EnginePool(engines)
        replies = [await pool.generate(ask(str(dialogue))) for dialogue in range(12)]
        assert set(replies) <= {1, 2} and engines[0].calls == 1

    asyncio.run(scenario())


def test_a_dialogue_whose_engine_dies_between_turns_goes_on_elsewhere_and_stays_there():
    async def scenario():
        engines = [StandIn(0), StandIn(1)]
        pool = EnginePool(engines)
        assert await pool.generate(ask("d", 0)) == 0
        engines[0].fail = RayActorError
        assert [await pool.generate(ask("d", turn)) for turn in (1, 2, 3)] == [1, 1, 1]
        assert engines[0].calls == 2

    asyncio.run(scenario())


def test_without_an_engine_left_the_error_says_so():
    async def scenario():
        pool = EnginePool([StandIn(0, RayActorError), StandIn(1, gone)])
        for _ in range(2):
            with pytest.raises(BoundaryError, match=r"^all 2 rollout engines have died$"):
                await pool.generate(ask("d"))

    asyncio.run(scenario())


def test_an_engine_that_fails_for_one_request_is_not_dead():
    async def scenario():
        engine = StandIn(0, lambda: RayTaskError("generate", "a traceback", ValueError("a bad prompt")))
        pool = EnginePool([engine])
        with pytest.raises(BoundaryError, match=r"^rollout engine: ValueError: a bad prompt$"):
            await pool.generate(ask("d"))
        engine.fail = None
        assert await pool.generate(ask("d")) == 0

    asyncio.run(scenario())


def test_an_engine_out_of_reach_for_a_moment_is_asked_again(monkeypatch):
    monkeypatch.setattr(pools, "UNAVAILABLE_WAIT_S", 0.01)

    async def scenario():
        engine = StandIn(0, lambda: ActorUnavailableError("no answer", None))
        running = asyncio.ensure_future(EnginePool([engine]).generate(ask("d")))
        while engine.calls < 2 and not running.done():
            await asyncio.sleep(0.005)
        engine.fail = None
        assert await running == 0

    asyncio.run(scenario())


def test_a_reply_that_is_late_is_called_off_and_no_longer_counts_as_load(monkeypatch):
    called_off = []
    monkeypatch.setattr(pools.ray, "cancel", called_off.append)

    async def scenario():
        engines = [StandIn(0), StandIn(1)]
        pool = EnginePool(engines)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.generate(ask("slow")), timeout=0.05)
        assert len(called_off) == 1 and called_off[0].cancelled()
        assert await pool.generate(ask("d")) == 0

    asyncio.run(scenario())
