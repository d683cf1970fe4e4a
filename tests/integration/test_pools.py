"""Routing over real Ray actors: the reward service's replicas, and engines that only say who they are."""

import asyncio
import sys

import pytest
import ray

from rlver_dist.cluster.actors import RewardServiceActor
from rlver_dist.cluster.pools import EnginePool, RewardPool, gather_metrics
from rlver_dist.cluster.session import causes, close_session, open_session
from rlver_dist.config import ClusterConfig, SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Message, Role
from rlver_dist.errors import BoundaryError, WeightSyncError
from rlver_dist.rollout.collector import GenerateRequest
from rlver_dist.simulator.protocol import UserRequest

# Ray's workers cannot import this file, so the classes below have to travel with their code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
PERSONA = load_split("bank", "train")[0]


@pytest.fixture(scope="module", autouse=True)
def session():
    yield open_session(ClusterConfig(dashboard=False))
    close_session()


@pytest.fixture
def replicas():
    service = ray.remote(RewardServiceActor)
    made = [service.options(num_cpus=0, max_concurrency=64).remote(SimulatorConfig()) for _ in range(2)]
    yield made
    for replica in made:
        ray.kill(replica)


def request(reply: str, turn_index: int = 0) -> UserRequest:
    messages = (Message(role=Role.USER, text=PERSONA.opening), Message(role=Role.ASSISTANT, text=reply))
    return UserRequest(dialogue_id="d", turn_index=turn_index, persona=PERSONA, messages=messages, emotion=30.0, seed=5, max_turns=8)


def test_replicas_agree_and_a_dead_one_never_changes_an_emotion_twice(replicas):
    reply = "That sounds exhausting, and you kept going anyway. What happened after that?"

    async def scenario():
        pool = RewardPool(replicas, "train")
        alone = [await RewardPool([replica], "train").respond(request(reply)) for replica in replicas]
        assert alone[0] == alone[1]
        assert alone[0].appraisal is not None and alone[0].emotion == pytest.approx(30 + alone[0].appraisal.change)
        crowd = await asyncio.gather(*(pool.respond(request(reply)) for _ in range(6)))
        assert all(answer == alone[0] for answer in crowd)
        counted = await gather_metrics(replicas)
        assert [values["requests"] for values in counted] == [4, 4]
        ray.kill(replicas[0])
        again = await asyncio.gather(*(pool.respond(request(reply)) for _ in range(4)))
        assert all(answer == alone[0] for answer in again)
        assert [values["requests"] for values in await gather_metrics(replicas)] == [4]
        ray.kill(replicas[1])
        with pytest.raises(BoundaryError, match="all 2 replicas have died"):
            await pool.respond(request(reply))

    asyncio.run(scenario())


class Named:
    """Stands where an engine stands; answers late, with its own name."""

    def __init__(self, name: int) -> None:
        self.name = name

    async def generate(self, request: GenerateRequest) -> int:
        await asyncio.sleep(0.3)
        return self.name


def test_dialogues_spread_over_engines_and_stay_where_their_prefix_is():
    engines = [ray.remote(Named).options(num_cpus=0, max_concurrency=64).remote(name) for name in range(3)]

    def ask(dialogue: int, turn: int) -> GenerateRequest:
        return GenerateRequest(dialogue_id=str(dialogue), turn_index=turn, prompt_ids=[1], max_tokens=1, temperature=1.0, seed=0)

    async def scenario():
        pool = EnginePool(engines)
        first = await asyncio.gather(*(pool.generate(ask(dialogue, 0)) for dialogue in range(9)))
        assert [first.count(name) for name in range(3)] == [3, 3, 3]
        second = await asyncio.gather(*(pool.generate(ask(dialogue, 1)) for dialogue in range(9)))
        assert second == first
        pool.forget_homes()
        assert await pool.generate(ask(8, 2)) == 0

    asyncio.run(scenario())


class Broken:
    """Fails on purpose, or by accident."""

    def fail(self, on_purpose: bool) -> None:
        raise WeightSyncError("engine 1 does not hold the weights") if on_purpose else ValueError("a bad shape")


def test_an_actors_own_error_surfaces_as_itself_and_any_other_as_one_line():
    actor = ray.remote(Broken).options(num_cpus=0).remote()
    with pytest.raises(WeightSyncError, match=r"^engine 1 does not hold the weights$"), causes():
        ray.get(actor.fail.remote(True))
    with pytest.raises(BoundaryError, match="ValueError: a bad shape") as caught, causes():
        ray.get(actor.fail.remote(False))
    assert "\n" not in str(caught.value) and "logs" in str(caught.value)
