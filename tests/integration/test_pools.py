"""Routing over real Ray actors: the reward service's replicas, the users' engines, engines that only say who
they are, and learners that only say what they are asked."""

import asyncio
import hashlib
import json
import random
import sys
import time
from dataclasses import replace

import pytest
import ray
from ray.exceptions import RayActorError
from transformers import AutoTokenizer

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.cluster.actors import RewardServiceActor
from rlver_dist.cluster.layout import resolve_layout
from rlver_dist.cluster.learners import CriticGroup
from rlver_dist.cluster.place import _make_ranks
from rlver_dist.cluster.pools import ChatPool, EnginePool, RewardPool, gather_metrics
from rlver_dist.cluster.session import close_session, open_session, unwrap_ray_errors
from rlver_dist.cluster.weight_sync import RemoteEngines
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import EndReason, Message, Role
from rlver_dist.errors import BoundaryError, BudgetError, GoneError, WeightSyncError
from rlver_dist.rollout.collector import DialogueTask, GenerateRequest, Generation, collect
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.protocol import UserRequest
from tests.integration import faulty_server
from tests.timing import hang_limit
from tests.unit import builders

# Ray's workers cannot import these files, so what is in them has to travel with its code.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(faulty_server)
PERSONAS = load_split("bank", "train")
PERSONA = PERSONAS[0]


@pytest.fixture(scope="module", autouse=True)
def session():
    yield open_session(ClusterConfig(dashboard=False))
    close_session()


def kill(actor) -> None:
    """Kill an actor and wait until Ray knows that it is dead; until then it may still answer."""
    ray.kill(actor)
    with pytest.raises(RayActorError):
        while True:
            ray.get(actor.__ray_ready__.remote(), timeout=hang_limit(30))


def started(count: int, simulator: SimulatorConfig, engines=()) -> list:
    """Replicas of the reward service that have loaded their users."""
    service = ray.remote(RewardServiceActor)
    made = [
        service.options(num_cpus=0, max_concurrency=512).remote(simulator, list(engines))
        for _ in range(count)
    ]
    ray.get([replica.start.remote() for replica in made])
    return made


@pytest.fixture
def replicas():
    made = started(2, SimulatorConfig())
    yield made
    for replica in made:
        ray.kill(replica)


def request(reply: str, turn_index: int = 0) -> UserRequest:
    messages = (Message(role=Role.USER, text=PERSONA.opening), Message(role=Role.ASSISTANT, text=reply))
    return UserRequest(
        dialogue_id="d",
        turn_index=turn_index,
        persona=PERSONA,
        messages=messages,
        emotion=30.0,
        seed=5,
        max_turns=8,
    )


def test_replicas_agree_and_a_dead_one_never_changes_an_emotion_twice(replicas):
    reply = "That sounds exhausting, and you kept going anyway. What happened after that?"

    async def scenario():
        pool = RewardPool(replicas, "train")
        alone = [await RewardPool([replica], "train").respond(request(reply)) for replica in replicas]
        assert alone[0] == alone[1]
        assert alone[0].appraisal is not None and alone[0].emotion == pytest.approx(
            30 + alone[0].appraisal.change
        )
        crowd = await asyncio.gather(*(pool.respond(request(reply)) for _ in range(6)))
        assert all(answer == alone[0] for answer in crowd)
        # Six at once for one persona: its own replica takes up to a quarter more than the mean.
        counted = [values["requests"] - 1 for values in await gather_metrics(replicas)]
        assert sorted(counted) == [2, 4]
        kill(replicas[0])
        again = await asyncio.gather(*(pool.respond(request(reply)) for _ in range(4)))
        assert all(answer == alone[0] for answer in again)
        assert [values["requests"] for values in await gather_metrics(replicas)] == [4]
        kill(replicas[1])
        with pytest.raises(BoundaryError, match="all 2 reward service replicas have died"):
            await pool.respond(request(reply))

    asyncio.run(scenario())


class StandInEngine:
    """Stands where a `ChatEngine` stands: fills in the schema, always alike for one prompt, and says who it
    is."""

    def __init__(self, name: str, fail: Exception | None = None) -> None:
        self.name, self.fail = name, fail
        self.dropped: list[str] = []

    def given_up(self) -> list[str]:
        """Keys of the calls that were cancelled while they ran."""
        return self.dropped

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        try:
            await asyncio.sleep(60 if request.key == "slow" else 0.02)
        except asyncio.CancelledError:
            self.dropped.append(request.key)
            raise
        if self.fail is not None:
            raise self.fail
        digest = hashlib.sha256(repr(request.messages).encode()).digest()
        text = json.dumps(faulty_server.fill(request.schema, random.Random(digest)))
        return ChatAnswer(
            text=text,
            prompt_tokens=10,
            cached_tokens=5,
            completion_tokens=3,
            seconds=0.0,
            retries=0,
            model=self.name,
        )


def stand_ins(count: int, fail: Exception | None = None) -> list:
    return [
        ray.remote(StandInEngine).options(num_cpus=0, max_concurrency=512).remote(str(name), fail)
        for name in range(count)
    ]


def chat(affinity: str = "p") -> ChatRequest:
    messages = (Message(role=Role.USER, text="Hello"),)
    schema = {
        "type": "object",
        "properties": {"goodbye": {"type": "boolean"}},
        "required": ["goodbye"],
        "additionalProperties": False,
    }
    return ChatRequest(
        key="k",
        messages=messages,
        schema_name="s",
        schema=schema,
        max_tokens=9,
        temperature=0.0,
        seed=0,
        affinity=affinity,
    )


def test_calls_with_one_prefix_meet_on_one_engine_and_move_on_when_it_dies():
    async def scenario():
        engines = stand_ins(3)
        pool = ChatPool(engines)
        homes = {name: (await pool.ask(chat(name))).model for name in map(str, range(12))}
        assert set(homes.values()) == {"0", "1", "2"}
        assert {name: (await pool.ask(chat(name))).model for name in homes} == homes
        kill(engines[1])
        after = {name: await pool.ask(chat(name)) for name in homes}
        assert all(after[name].model == home for name, home in homes.items() if home != "1")
        assert {answer.model for answer in after.values()} == {"0", "2"}
        values = pool.metrics()
        assert (values["calls"], values["retries"], values["failures"], values["engines_lost_max"]) == (
            36,
            1,
            0,
            1,
        )
        assert (values["prompt_tokens"], values["cached_tokens"]) == (360, 180)
        for engine in (engines[0], engines[2]):
            kill(engine)
        with pytest.raises(BoundaryError, match="all 3 user engines have died"):
            await pool.ask(chat())
        assert pool.metrics()["failures"] == 1

    asyncio.run(scenario())


def test_an_engine_whose_process_died_under_its_actor_is_asked_no_more():
    async def scenario():
        pool = ChatPool([*stand_ins(1, GoneError("k: vLLM engine of m: its process died")), *stand_ins(1)])
        answers = [await pool.ask(chat(name)) for name in map(str, range(8))]
        assert len(answers) == 8 and sum(answer.retries for answer in answers) == 1
        assert pool.metrics()["engines_lost_max"] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [
        (BoundaryError("k: the prompt is too long"), BoundaryError, "^k: the prompt is too long$"),
        (BudgetError("max_cost: used up"), BudgetError, "^max_cost: used up$"),
        (ValueError("a bad shape"), BoundaryError, "^user engine: ValueError: a bad shape$"),
    ],
)
def test_an_engines_error_reaches_the_caller_as_what_it_is(raised, seen, words):
    with pytest.raises(seen, match=words):
        asyncio.run(ChatPool(stand_ins(1, raised)).ask(chat()))


def test_a_used_up_budget_passes_through_service_and_pool():
    simulator = SimulatorConfig(backend=SimulatorBackend.vllm)
    (replica,) = started(1, simulator, stand_ins(1, BudgetError("max_cost: used up")))
    with pytest.raises(BudgetError, match=r"^max_cost: used up$"):
        asyncio.run(RewardPool([replica], "train").respond(request("I see.")))


async def until_given_up(engine) -> list[str]:
    """What the engine's calls were given up for, once there is any."""
    deadline = time.monotonic() + hang_limit(10)
    while not (dropped := await engine.given_up.remote()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return dropped


def test_a_caller_that_gives_up_takes_its_call_along():
    async def scenario():
        (engine,) = stand_ins(1)
        pool = ChatPool([engine])
        await pool.ask(chat())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.ask(replace(chat(), key="slow")), timeout=0.5)
        assert await until_given_up(engine) == ["slow"]
        assert (await pool.ask(chat())).model == "0"

    asyncio.run(scenario())


REPLIES = (
    "So the letter came on Friday.",
    "And your brother said nothing?",
    "I see.",
    "That was four years of work.",
)
LIMITS = builders.limits(
    max_turns=4, max_reply_tokens=30, max_context_tokens=4000, max_concurrent=12, request_timeout_s=60.0
)


def hold(respond, renderer: Renderer) -> list:
    """24 dialogues with a policy whose replies follow from its seeds alone."""

    async def generate(request: GenerateRequest) -> Generation:
        ids = renderer.encode_reply("", REPLIES[request.seed % len(REPLIES)])
        return Generation(
            token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop", policy_version=(0, 0)
        )

    tasks = [DialogueTask(id=f"d{i:02d}", group_id="g", persona=PERSONAS[i % 6], seed=i) for i in range(24)]
    return asyncio.run(collect(tasks, generate=generate, respond=respond, renderer=renderer, limits=LIMITS))


@pytest.mark.parametrize("backend", [SimulatorBackend.embedded, SimulatorBackend.vllm])
def test_killing_replicas_and_engines_costs_calls_and_changes_no_emotion_twice(backend):
    renderer = Renderer(AutoTokenizer.from_pretrained(resolve(SMOLLM2)), "Be kind.")
    simulator = SimulatorConfig(backend=backend)
    engines = stand_ins(2) if backend is SimulatorBackend.vllm else []
    replicas = started(3, simulator, engines)
    pool = RewardPool(replicas, "train")
    calm = hold(pool.respond, renderer)
    victims = {20: replicas[0], 45: engines[0] if engines else replicas[1], 60: replicas[1]}
    asked = 0

    async def respond_while_they_die(asking: UserRequest):
        nonlocal asked
        asked += 1
        if victim := victims.pop(asked, None):
            ray.kill(victim)
        return await pool.respond(asking)

    stormy = hold(respond_while_they_die, renderer)
    assert not victims
    survivors = asyncio.run(gathered(replicas))
    assert len(survivors) == 1
    if backend is SimulatorBackend.embedded:
        assert stormy == calm
    # Two engines call themselves by different names, and nothing else may differ.
    assert [outline(dialogue) for dialogue in stormy] == [outline(dialogue) for dialogue in calm]
    for dialogue in stormy:
        assert dialogue.end_reason is not EndReason.INFRASTRUCTURE
        emotion = dialogue.start_emotion
        for turn in dialogue.turns:
            assert turn.appraisal is not None and turn.emotion_before == emotion
            assert turn.emotion_after == pytest.approx(min(max(emotion + turn.appraisal.change, 0), 100))
            emotion = turn.emotion_after
        assert dialogue.final_emotion == emotion


async def gathered(replicas) -> list:
    return await gather_metrics(replicas)


def outline(dialogue) -> list:
    """What was said and felt, without the names of what judged."""
    told = [
        (turn.reply, turn.emotion_after, replace(turn.appraisal, source=""), turn.user_message)
        for turn in dialogue.turns
    ]
    return [dialogue.id, dialogue.opening, dialogue.end_reason, dialogue.final_emotion, told]


class Named:
    """Stands where an engine stands; answers late, with its own name."""

    def __init__(self, name: int) -> None:
        self.name = name
        self.dropped: list[str] = []

    def given_up(self) -> list[str]:
        """Dialogues whose reply was called off while it was sampled."""
        return self.dropped

    async def generate(self, request: GenerateRequest) -> int:
        try:
            await asyncio.sleep(60 if request.dialogue_id == "slow" else 0.3)
        except asyncio.CancelledError:
            self.dropped.append(request.dialogue_id)
            raise
        return self.name


def named(count: int) -> list:
    return [ray.remote(Named).options(num_cpus=0, max_concurrency=64).remote(name) for name in range(count)]


def ask(dialogue: int | str, turn: int) -> GenerateRequest:
    return GenerateRequest(
        dialogue_id=str(dialogue), turn_index=turn, prompt_ids=[1], max_tokens=1, temperature=1.0, seed=0
    )


def test_dialogues_spread_over_engines_and_stay_where_their_prefix_is():
    engines = named(3)

    async def scenario():
        pool = EnginePool(engines)
        first = await asyncio.gather(*(pool.generate(ask(dialogue, 0)) for dialogue in range(9)))
        assert [first.count(name) for name in range(3)] == [3, 3, 3]
        second = await asyncio.gather(*(pool.generate(ask(dialogue, 1)) for dialogue in range(9)))
        assert second == first
        pool.forget_homes()
        assert await pool.generate(ask(8, 2)) == 0

    asyncio.run(scenario())


def test_the_dialogues_of_a_dead_rollout_engine_move_to_the_others_and_no_new_ones_come():
    engines = named(3)

    async def scenario():
        pool = EnginePool(engines)
        first = await asyncio.gather(*(pool.generate(ask(dialogue, 0)) for dialogue in range(9)))
        running = [asyncio.ensure_future(pool.generate(ask(dialogue, 1))) for dialogue in range(9)]
        await asyncio.sleep(0.1)
        kill(engines[0])
        second = await asyncio.gather(*running)
        assert all(after == before for before, after in zip(first, second, strict=True) if before != 0)
        assert set(second) == {1, 2}
        assert {await pool.generate(ask(dialogue, 0)) for dialogue in range(9, 12)} <= {1, 2}
        for engine in engines[1:]:
            kill(engine)
        with pytest.raises(BoundaryError, match=r"^all 3 rollout engines have died$"):
            await pool.generate(ask(12, 0))

    asyncio.run(scenario())


def test_a_late_reply_is_called_off_on_its_engine():
    async def scenario():
        (engine,) = named(1)
        pool = EnginePool([engine])
        await pool.generate(
            ask("first", 0)
        )  # from here on the engine is there to hear of it, however long that took
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.generate(ask("slow", 0)), timeout=1)
        assert await until_given_up(engine) == ["slow"]
        assert await pool.generate(ask("next", 0)) == 0

    asyncio.run(scenario())


class Broken:
    """Fails on purpose, or by accident."""

    def fail(self, on_purpose: bool) -> None:
        raise (
            WeightSyncError("engine 1 does not hold the weights") if on_purpose else ValueError("a bad shape")
        )


def test_an_actors_own_error_surfaces_as_itself_and_any_other_as_one_line():
    actor = ray.remote(Broken).options(num_cpus=0).remote()
    with pytest.raises(WeightSyncError, match=r"^engine 1 does not hold the weights$"), unwrap_ray_errors():
        ray.get(actor.fail.remote(True))
    with pytest.raises(BoundaryError, match="ValueError: a bad shape") as caught, unwrap_ray_errors():
        ray.get(actor.fail.remote(False))
    assert "\n" not in str(caught.value) and "logs" in str(caught.value)


class StandInLearner:
    """Stands where a learner's rank stands: says where it was told to meet, and computes until somebody asks
    how far it is."""

    def __init__(self, settings: str, place) -> None:
        self.settings, self.place = settings, place
        self.meeting: tuple[str, int] | None = None
        self.asked = False

    def start(self, address: str, port: int) -> None:
        self.meeting = (address, port)

    def values(self, samples: list) -> list:
        deadline = time.monotonic() + 300  # for a call that waits for this one to end
        while not self.asked and self.place.rank == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        return [self.settings, self.meeting, samples, self.asked]

    def progress(self) -> tuple[int, int]:
        self.asked = True
        return self.place.rank, self.place.world_size


def test_the_ranks_of_a_learner_meet_and_one_answers_while_it_computes():
    layout = resolve_layout(RunConfig(cluster=ClusterConfig(device=Device.cpu)), num_gpus=0, num_cpus=2)
    ranks = _make_ranks(StandInLearner, "settings", "stand_in_learner", 2, layout, None, 0)

    async def scenario():
        group = CriticGroup(ranks)
        await group.start()
        computing = asyncio.create_task(group.values([1, 2]))
        assert await group.progress() == (0, 2)
        settings, (address, port), samples, asked = await computing
        assert (settings, samples, asked) == ("settings", [1, 2], True)
        assert address == ray.util.get_node_ip_address() and port > 0
        second = await ranks[1].values.remote([])
        assert second[1] == (address, port)

    asyncio.run(scenario())
    for rank in ranks:
        ray.kill(rank)


class StandInReceiver:
    """Stands where a rollout engine stands in a transfer over NCCL: notes what it is told."""

    def __init__(self) -> None:
        self.told: list = []

    async def connect(self, init_info: dict) -> None:
        self.told.append(init_info)

    async def start_update(self) -> None:
        self.told.append("start")

    async def receive_update(self, update_info: dict) -> None:
        self.told.append(update_info)

    async def finish_update(self, version: int) -> None:
        self.told.append(version)

    async def heard(self) -> list:
        return self.told


def test_a_learner_drives_all_engines_from_its_own_process():
    def drive(engines: RemoteEngines) -> tuple[int, ...]:
        engines.connect([{"rank_offset": 1}, {"rank_offset": 3}])
        engines.start_update()
        engines.receive_update({"names": ["a"]})
        engines.finish_update(7)
        return engines.workers_per_engine

    receivers = [ray.remote(StandInReceiver).options(num_cpus=0).remote() for _ in range(2)]
    learner = ray.remote(drive).options(num_cpus=0)
    assert ray.get(learner.remote(RemoteEngines(receivers, 2))) == (2, 2)
    heard = ray.get([receiver.heard.remote() for receiver in receivers])
    assert heard == [[{"rank_offset": offset}, "start", {"names": ["a"]}, 7] for offset in (1, 3)]
