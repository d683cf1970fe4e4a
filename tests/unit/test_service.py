"""The embedded simulator behind the reward service."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Appraisal, EndReason, Message, Role
from rlver_dist.errors import BudgetError, DataError, RlverError
from rlver_dist.latency import nearest_rank
from rlver_dist.simulator.appraiser import AppraisalContext
from rlver_dist.simulator.presets import PRESETS, resolve_rules
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
from rlver_dist.simulator.rules.user import EmbeddedSimulator
from rlver_dist.simulator.service import RewardService
from rlver_dist.simulator.suitability import check_personas
from tests.unit import builders
from tests.unit.test_messages import FACTS, OPENING, persona


class NumberAppraiser:
    """Takes a reply at its first word, the change in points. For tests of everything around the appraisal."""

    def appraise(self, context: AppraisalContext) -> Appraisal:
        return builders.appraisal(float(context.messages[-1].text.split()[0]))


SIMULATOR = EmbeddedSimulator(rules=PRESETS[Preset.rlver_vanilla], appraiser=NumberAppraiser())


def request(
    *replies: str,
    dialogue_id: str = "d1",
    emotion: float = 30.0,
    max_turns: int = 8,
    who: Persona | None = None,
) -> UserRequest:
    """The request after the last of `replies`; between them the user told their facts."""
    messages = [Message(role=Role.USER, text=OPENING)]
    for turn, reply in enumerate(replies):
        messages.append(Message(role=Role.ASSISTANT, text=reply))
        if turn < len(replies) - 1:
            messages.append(Message(role=Role.USER, text=FACTS[turn]))
    return UserRequest(
        dialogue_id=dialogue_id,
        turn_index=len(replies) - 1,
        persona=who or persona(),
        messages=tuple(messages) if replies else (),
        emotion=emotion,
        seed=3,
        max_turns=max_turns,
    )


def test_opening() -> None:
    assert SIMULATOR.respond(request()) == UserResponse(
        appraisal=None, emotion=30.0, message=OPENING, end_reason=None
    )


@pytest.mark.parametrize(
    ("reply", "before", "turns", "after", "reason"),
    [
        ("4.5", 30.0, 8, 34.5, None),
        ("25", 95.0, 8, 100.0, EndReason.EMOTION_HIGH),
        ("-25", 19.9, 8, 9.9, EndReason.EMOTION_LOW),
        ("-25", 20.0, 8, 10.0, None),
        ("2", 30.0, 1, 32.0, EndReason.MAX_TURNS),
    ],
)
def test_emotion_and_end(
    reply: str, before: float, turns: int, after: float, reason: EndReason | None
) -> None:
    answer = SIMULATOR.respond(request(reply, emotion=before, max_turns=turns))
    assert (answer.emotion, answer.end_reason) == (after, reason)
    assert (answer.message is None) == (reason is not None)
    assert answer.appraisal is not None and abs(answer.appraisal.change) <= 10.0


def test_goodbye_is_an_end() -> None:
    who = replace(persona(), facts=FACTS[:1])
    messages = [OPENING, "1 point", FACTS[0], "0 points", "That's everything, really.", "0 points"]
    asked = replace(
        request("0", who=who, emotion=50.0),
        turn_index=2,
        messages=tuple(
            Message(role=Role.ASSISTANT if i % 2 else Role.USER, text=text) for i, text in enumerate(messages)
        ),
    )
    answer = SIMULATOR.respond(asked)
    assert (answer.message, answer.end_reason) == (None, EndReason.GOODBYE)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"language": "zh"}, "language=zh"), ({"opening": ""}, "opening"), ({"facts": ()}, "facts")],
)
def test_personas_that_rules_cannot_voice_are_refused(change: dict, field: str) -> None:
    strange = replace(persona(), id="p9", **change)
    with pytest.raises(DataError, match=rf"persona p9: {field}.*data.train=bank"):
        check_personas([persona(), strange])
    with pytest.raises(DataError, match="p9"):
        SIMULATOR.respond(request(who=strange))
    check_personas([persona()])


def test_a_request_without_a_reply_is_refused() -> None:
    with pytest.raises(ValueError, match="d1, turn 0"):
        SIMULATOR.respond(replace(request("1"), messages=(Message(role=Role.USER, text=OPENING),)))


def test_real_appraiser_end_to_end() -> None:
    """Same request, same response; no word at all costs the most; whatever is said, the rules of emotion
    hold."""
    simulator = EmbeddedSimulator(
        rules=resolve_rules(SimulatorConfig(preset=Preset.sage)), appraiser=EmbeddedAppraiser()
    )
    assert simulator.respond(request()).emotion == 40.0
    asked = request("That is a lot of trouble for one yard. What happened with the axe?", emotion=40.0)
    first = simulator.respond(asked)
    assert first == simulator.respond(asked)
    assert first.appraisal is not None and first.emotion == pytest.approx(40.0 + first.appraisal.change)
    assert first.message is not None and FACTS[0] in first.message
    assert simulator.respond(request("", emotion=40.0)).emotion == 30.0


class SlowSimulator:
    """Answers after `seconds` and once `gate` is open, one call at a time, and fails for dialogues named
    "broken"."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.threads: set[int] = set()
        self.asked: list[str] = []
        self.inside = 0
        self.gate = threading.Event()
        self.gate.set()

    def respond(self, asked: UserRequest) -> UserResponse:
        self.inside += 1
        assert self.inside == 1
        self.threads.add(threading.get_ident())
        self.asked.append(asked.dialogue_id)
        time.sleep(self.seconds)
        self.gate.wait()
        self.inside -= 1
        if asked.dialogue_id == "broken":
            raise RlverError("no such yard")
        return SIMULATOR.respond(asked)


def test_service_answers_as_the_simulator_does_and_a_retry_changes_nothing() -> None:
    async def ask() -> None:
        service = RewardService(SIMULATOR)
        asked = request("3")
        assert await service.respond(asked) == SIMULATOR.respond(asked) == await service.respond(asked)
        assert await service.respond(request("3", "4")) == SIMULATOR.respond(request("3", "4"))
        metrics = service.metrics()
        assert (metrics["requests"], metrics["retries"], metrics["failures"]) == (3.0, 1.0, 0.0)
        assert metrics["queue_depth_max"] == 1.0 and metrics["batch_size_mean"] == 1.0
        service.close()

    asyncio.run(ask())


def test_one_error_fails_one_request() -> None:
    async def ask() -> None:
        service = RewardService(SlowSimulator())
        asked = [request("1", dialogue_id=name) for name in ("a", "broken", "b")]
        answers = await asyncio.gather(*map(service.respond, asked), return_exceptions=True)
        assert isinstance(answers[1], RlverError)
        assert [answers[0], answers[2]] == [SIMULATOR.respond(asked[0]), SIMULATOR.respond(asked[2])]
        assert service.metrics()["failures"] == 1.0
        service.close()

    asyncio.run(ask())


def test_many_at_once_use_one_thread_and_leave_the_loop_free() -> None:
    async def ask() -> None:
        simulator = SlowSimulator(seconds=0.005)
        service = RewardService(simulator)
        asking = asyncio.gather(*(service.respond(request("1", dialogue_id=f"d{i}")) for i in range(40)))
        ticks = 0
        while not asking.done():
            await asyncio.sleep(0.002)
            ticks += 1
        assert len(await asking) == 40 and ticks > 20
        assert len(simulator.threads) == 1 and threading.get_ident() not in simulator.threads
        metrics = service.metrics()
        assert metrics["queue_depth_max"] == 40.0 and metrics["batch_size_mean"] == 40.0
        assert 0.004 < metrics["latency_p50_s"] <= metrics["latency_p95_s"] <= metrics["latency_max_s"]
        assert service.metrics() == {"requests": 0.0, "retries": 0.0, "failures": 0.0, "queue_depth_max": 0.0}
        service.close()

    asyncio.run(ask())


class WaitingSimulator:
    """Waits `seconds` for something else, any number of calls at a time, and fails for dialogues named
    "broken"."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.inside, self.most = seconds, 0, 0

    async def respond(self, asked: UserRequest) -> UserResponse:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(self.seconds if asked.dialogue_id != "slow" else 20 * self.seconds)
        self.inside -= 1
        if asked.dialogue_id == "broken":
            raise BudgetError("no such yard")
        return SIMULATOR.respond(asked)


def test_users_that_wait_for_others_are_asked_all_at_once_and_none_waits_for_another() -> None:
    async def ask() -> None:
        simulator = WaitingSimulator(0.02)
        service = RewardService(simulator)
        slow = asyncio.ensure_future(service.respond(request("1", dialogue_id="slow")))
        names = [f"d{i}" for i in range(50)]
        answers = await asyncio.gather(*(service.respond(request("1", dialogue_id=name)) for name in names))
        assert not slow.done() and simulator.most == 51
        assert answers == [SIMULATOR.respond(request("1", dialogue_id=name)) for name in names]
        with pytest.raises(BudgetError):
            await service.respond(request("1", dialogue_id="broken"))
        await slow
        metrics = service.metrics()
        assert (metrics["requests"], metrics["failures"], metrics["queue_depth_max"]) == (52.0, 1.0, 51.0)
        assert (
            metrics["latency_p50_s"]
            <= metrics["latency_p95_s"]
            <= metrics["latency_p99_s"]
            <= metrics["latency_max_s"]
        )
        assert metrics["latency_p95_s"] < 0.4 <= metrics["latency_max_s"] and "batch_size_mean" not in metrics
        service.close()

    asyncio.run(ask())


def test_a_caller_that_gave_up_harms_nobody() -> None:
    async def ask() -> None:
        simulator = SlowSimulator()
        service = RewardService(simulator)
        simulator.gate.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.respond(request("1")), timeout=0.005)
        simulator.gate.set()
        assert await service.respond(request("1")) == SIMULATOR.respond(request("1"))
        assert service.metrics()["retries"] == 1.0
        service.close()

    asyncio.run(ask())


def test_one_that_gave_up_before_its_turn_is_not_answered() -> None:
    async def ask() -> None:
        simulator = SlowSimulator()
        service = RewardService(simulator)
        simulator.gate.clear()
        first = asyncio.ensure_future(service.respond(request("1", dialogue_id="a")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.respond(request("1", dialogue_id="b")), timeout=0.005)
        simulator.gate.set()
        await first
        await service.respond(request("1", dialogue_id="c"))
        assert simulator.asked == ["a", "c"]
        service.close()

    asyncio.run(ask())


def test_nearest_rank_by_hand() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert [nearest_rank(values, q) for q in (0.25, 0.5, 0.51, 0.95)] == [1.0, 2.0, 3.0, 4.0]
