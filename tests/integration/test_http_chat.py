"""`HttpChat` against a server that fails in every way that a server can, over real sockets."""

import asyncio
import contextlib
import json
import logging
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from benchmarks.faults import Outcome, failure_kind, hold_dialogues, table
from rlver_dist.chat_client.http import HttpChat
from rlver_dist.chat_client.protocol import ChatRequest
from rlver_dist.config.algorithm import EndRewardConfig
from rlver_dist.config.enums import Preset, ResponseFormat
from rlver_dist.config.simulator import HttpChatConfig
from rlver_dist.dialogue import Dialogue, EndReason, Message, Role
from rlver_dist.errors import BoundaryError, BudgetError
from rlver_dist.experience.rewards import dialogue_reward
from rlver_dist.simulator.emotion import move
from rlver_dist.simulator.presets import PRESETS
from tests.integration.faulty_server import MODEL, Canned, FaultyServer, Kind
from tests.timing import hang_limit

SCHEMA = {
    "type": "object",
    "properties": {"change": {"type": "integer", "minimum": -10, "maximum": 10}},
    "required": ["change"],
    "additionalProperties": False,
}
KEY = "sk-hunter2-0123456789"
IN_BODY = (Kind.WRONG_SCHEMA, Kind.WRONG_TYPES, Kind.NAN_ANSWER, Kind.INJECTED_TEXT)
"""Sound bodies with a bad answer inside, which is the asker's matter."""
FAULT_OF = {
    Kind.TIMEOUT: "timeout",
    Kind.DRIP: "timeout",
    Kind.RATE_LIMIT: "rate_limit",
    Kind.SERVER_ERROR: "server",
    Kind.UNAVAILABLE: "server",
    Kind.CUT_CONNECTION: "connection",
    Kind.CUT_BODY: "connection",
    Kind.HUGE_BODY: "too_large",
    Kind.NO_JSON: "malformed",
    Kind.NAN_BODY: "malformed",
    Kind.WRONG_BODY_TYPES: "malformed",
}


def request(number: int = 0) -> ChatRequest:
    messages = (
        Message(role=Role.SYSTEM, text="You are Ada."),
        Message(role=Role.USER, text=f"It is about {number}."),
    )
    return ChatRequest(
        key=f"d{number}/0/appraise",
        messages=messages,
        schema_name="appraise",
        schema=SCHEMA,
        max_tokens=50,
        temperature=0.0,
        seed=1,
        affinity="p",
    )


@contextlib.asynccontextmanager
async def chat(*servers: FaultyServer, **options):
    """A backend for servers that are up; short deadlines."""
    defaults = dict(model="m", api_key_env="", timeout_s=0.5, max_retries=2, max_backoff_s=0.02)
    backend = HttpChat(
        config=HttpChatConfig(endpoints=",".join(server.url for server in servers), **(defaults | options))
    )
    try:
        yield backend
    finally:
        await backend.close()


async def ask_all(backend: HttpChat, count: int) -> list:
    return await asyncio.gather(
        *(backend.ask(request(number)) for number in range(count)), return_exceptions=True
    )


def test_answers_tokens_and_cost():
    async def scenario():
        async with (
            FaultyServer() as server,
            chat(server, price_per_million_prompt=2.0, price_per_million_completion=10.0) as backend,
        ):
            answers = await ask_all(backend, 20)
            return server, answers, backend.metrics(), backend.metrics()

    server, answers, values, empty = asyncio.run(scenario())
    assert all(-10 <= json.loads(answer.text)["change"] <= 10 for answer in answers)
    # Seven words a prompt, two a completion; half of the prompt is cached.
    assert {(answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) for answer in answers} == {
        (7, 3, 2)
    }
    assert {(answer.retries, answer.model) for answer in answers} == {(0, MODEL)}
    assert (values["calls"], values["failures"], values["retries"], values["estimated_usage"]) == (
        20,
        0,
        0,
        0,
    )
    assert (values["prompt_tokens"], values["cached_tokens"], values["completion_tokens"]) == (140, 60, 40)
    assert values["cost"] == pytest.approx((140 * 2 + 40 * 10) / 1e6)
    assert 0 < values["latency_p50_s"] <= values["latency_p95_s"] <= values["latency_p99_s"]
    assert empty["calls"] == empty["cost"] == 0 and "latency_p50_s" not in empty
    assert len(server.hits) == 20 and "authorization" not in server.hits[0].headers


@pytest.mark.parametrize("kind", FAULT_OF, ids=lambda kind: kind.value)
def test_a_passing_fault_costs_a_retry_and_is_counted_once(kind):
    async def scenario():
        async with FaultyServer(script=[kind]) as server, chat(server) as backend:
            started = time.perf_counter()
            answer = await backend.ask(request())
            return server, answer, backend.metrics(), time.perf_counter() - started

    server, answer, values, seconds = asyncio.run(scenario())
    assert answer.retries == 1 and json.loads(answer.text).keys() == {"change"} and len(server.hits) == 2
    assert {name: count for name, count in values.items() if name.startswith("fault_") and count} == {
        f"fault_{FAULT_OF[kind]}": 1.0
    }
    assert (values["calls"], values["retries"], values["failures"]) == (1, 1, 0)
    # The answer's own tokens once; what the broken attempt used is nowhere said, and kept apart.
    assert (values["prompt_tokens"], values["completion_tokens"]) == (7, 2)
    assert values["lost_attempts"] == (kind not in (Kind.RATE_LIMIT, Kind.SERVER_ERROR, Kind.UNAVAILABLE))
    assert seconds < hang_limit(3)


@pytest.mark.parametrize(
    "kind",
    [Kind.TIMEOUT, Kind.DRIP, Kind.HUGE_BODY, Kind.CUT_BODY, Kind.SERVER_ERROR],
    ids=lambda kind: kind.value,
)
def test_a_lasting_fault_ends_in_one_line_after_bounded_time(kind):
    async def scenario():
        async with FaultyServer(rate=1.0, kinds=[kind]) as server, chat(server, timeout_s=0.2) as backend:
            started = time.perf_counter()
            [error] = await ask_all(backend, 1)
            return server, error, backend.metrics(), time.perf_counter() - started

    server, error, values, seconds = asyncio.run(scenario())
    assert type(error) is BoundaryError and len(server.hits) == 3
    assert str(error).startswith(
        "d0/0/appraise: no answer in 3 attempts; last: 127.0.0.1:"
    ) and "\n" not in str(error)
    assert FAULT_OF[kind] in str(error) and (values["calls"], values["failures"], values["retries"]) == (
        1,
        1,
        2,
    )
    assert seconds < hang_limit(3)


def test_nobody_listens():
    async def scenario():
        async with FaultyServer() as server:
            pass
        async with chat(server, max_retries=1) as backend:
            return await ask_all(backend, 1), backend.metrics()

    [error], values = asyncio.run(scenario())
    assert type(error) is BoundaryError and "connection" in str(error)
    assert values["fault_connection"] == 2 and values["lost_attempts"] == 0


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_back_every_call(as_date):
    async def scenario():
        # A date has whole seconds: at least one second from now, at most two.
        wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
        limited = FaultyServer(script=[Kind.RATE_LIMIT], retry_after=wait)
        async with limited as server, chat(server, max_concurrent=4, timeout_s=2) as backend:
            first = asyncio.create_task(backend.ask(request(0)))
            while not server.hits:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            answers = await ask_all(backend, 6)
            return server, [await first, *answers]

    server, answers = asyncio.run(scenario())
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    refused, *later = [hit.at for hit in server.hits]
    assert len(later) == 7 and min(later) - refused >= (0.95 if as_date else 1.0)


def test_a_wait_beyond_all_patience_stops_the_run():
    async def scenario():
        async with (
            FaultyServer(script=[Kind.RATE_LIMIT], retry_after="3600") as server,
            chat(server) as backend,
        ):
            return [await ask_all(backend, 1), await ask_all(backend, 1)], len(server.hits)

    errors, hits = asyncio.run(scenario())
    assert (
        all(
            type(error) is BudgetError and "asks for no call within 3600 s" in str(error)
            for [error] in errors
        )
        and hits == 1
    )


def test_calls_in_flight_and_their_pace_are_limited():
    async def scenario():
        async with (
            FaultyServer(delay_s=0.02) as server,
            chat(server, max_concurrent=3, requests_per_minute=2400) as backend,
        ):
            await ask_all(backend, 20)
            return server

    server = asyncio.run(scenario())
    assert server.most_in_flight <= 3
    times = sorted(hit.at for hit in server.hits)
    assert len(times) == 20 and times[-1] - times[0] >= 19 * 60 / 2400 - 0.02


def test_another_endpoint_takes_over_and_the_first_rests():
    async def scenario():
        broken = FaultyServer(rate=1.0, kinds=[Kind.SERVER_ERROR])
        async with broken, FaultyServer() as sound, chat(broken, sound, max_backoff_s=1.5) as backend:
            answers = [await backend.ask(request(number)) for number in range(10)]
            before = len(broken.hits)
            await asyncio.sleep(1.5)
            broken.rate = 0.0
            answers += [await backend.ask(request(number)) for number in range(10, 13)]
            return broken, sound, before, answers

    broken, sound, before, answers = asyncio.run(scenario())
    assert [answer.retries for answer in answers] == [1] * 3 + [0] * 10
    # Three failures in a row, then rest; back to the first endpoint when the rest is over.
    assert before == 3 and len(broken.hits) == 6 and len(sound.hits) == 10


def refusal(status, **error) -> Canned:
    return Canned(status=status, body=json.dumps({"error": error}).encode())


def test_a_refusal_is_final_unless_another_endpoint_takes_the_call():
    async def scenario():
        refused = refusal(404, message="no such model")
        async with FaultyServer(script=[refused, refused]) as first, FaultyServer() as second:
            async with chat(first, max_retries=5) as alone:
                [error] = await ask_all(alone, 1)
            async with chat(first, second, max_retries=0) as both:
                return error, await both.ask(request()), len(first.hits), len(second.hits)

    error, answer, first, second = asyncio.run(scenario())
    assert type(error) is BoundaryError and "refused: HTTP 404 (no such model)" in str(error)
    assert answer.retries == 1 and (first, second) == (2, 1)


@pytest.mark.parametrize(
    "refused", [refusal(402), refusal(429, code="insufficient_quota", message="You exceeded your quota.")]
)
def test_quota_used_up_stops_the_run_unless_another_endpoint_has_some(refused):
    async def scenario():
        async with FaultyServer(script=[refused] * 2) as first, FaultyServer() as second:
            async with chat(first, max_retries=0) as alone:
                errors = [*await ask_all(alone, 1), *await ask_all(alone, 1)]
            hits = len(first.hits)
            async with chat(first, second, max_retries=0) as both:
                return errors, hits, [await both.ask(request(number)) for number in range(3)], len(first.hits)

    errors, hits, answers, in_all = asyncio.run(scenario())
    assert all(
        type(error) is BudgetError and "quota or credit is used up: HTTP" in str(error) for error in errors
    )
    assert hits == 1 and in_all == 2 and [answer.retries for answer in answers] == [1, 0, 0]


def test_the_budget_stops_all_further_calls():
    async def scenario(**limits):
        async with FaultyServer() as server, chat(server, max_concurrent=2, **limits) as backend:
            outcomes = await ask_all(backend, 20)
            return len(server.hits), [outcome for outcome in outcomes if isinstance(outcome, Exception)]

    # Nine tokens a call: the fifth reaches 45, and one more may be in flight.
    hits, errors = asyncio.run(scenario(max_tokens_total=40))
    assert hits in (5, 6) and len(errors) == 20 - hits
    assert all(
        type(error) is BudgetError and "simulator.openai.max_tokens_total=40: used up" in str(error)
        for error in errors
    )
    # 7 x 100 + 2 x 1000 per million: 0.0027 a call.
    hits, errors = asyncio.run(
        scenario(max_cost=0.0135, price_per_million_prompt=100.0, price_per_million_completion=1000.0)
    )
    assert hits in (5, 6) and {type(error) for error in errors} == {BudgetError}


def test_the_budget_counts_attempts_whose_use_nobody_knows():
    async def scenario():
        async with (
            FaultyServer(rate=1.0, kinds=[Kind.CUT_BODY]) as server,
            chat(server, max_tokens_total=150, max_retries=9) as backend,
        ):
            [error] = await ask_all(backend, 1)
            return error, backend.metrics(), len(server.hits)

    error, values, hits = asyncio.run(scenario())
    assert type(error) is BudgetError and values["lost_attempts"] == hits and values["prompt_tokens"] == 0
    # Each may have sampled its 50 tokens and read a body of more than a hundred bytes.
    assert 75 < values["lost_tokens"] / hits < 300 and values["lost_tokens"] >= 150


def test_missing_usage_is_estimated_and_said():
    async def scenario():
        async with FaultyServer(usage=False) as server, chat(server) as backend:
            return await backend.ask(request()), backend.metrics()

    answer, values = asyncio.run(scenario())
    assert values["estimated_usage"] == 1 and values["prompt_tokens"] == answer.prompt_tokens > 50
    assert answer.completion_tokens == -(-len(answer.text) // 4)


def test_a_cancelled_caller_cancels_its_call_and_frees_its_place():
    async def scenario():
        async with (
            FaultyServer(script=[Kind.TIMEOUT]) as server,
            chat(server, max_concurrent=1, timeout_s=30.0) as backend,
        ):
            waiting = asyncio.create_task(backend.ask(request(0)))
            while not server.hits:
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            answer = await asyncio.wait_for(backend.ask(request(1)), 5)
            return server, answer, backend.metrics()

    server, answer, values = asyncio.run(scenario())
    assert answer.retries == 0 and [hit.body["messages"][1]["content"] for hit in server.hits] == [
        "It is about 0.",
        "It is about 1.",
    ]
    assert (values["calls"], values["cancelled"], values["lost_attempts"], values["failures"]) == (2, 1, 1, 0)


def test_endpoints_that_want_other_words_get_them():
    tokens = refusal(400, message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    lengths = refusal(400, message="Invalid schema: 'minLength' is not permitted.")

    async def scenario():
        async with FaultyServer(script=[tokens, lengths]) as server, chat(server, max_retries=0) as backend:
            return server, [await backend.ask(request(number)) for number in range(2)]

    server, answers = asyncio.run(scenario())
    assert [answer.retries for answer in answers] == [2, 0] and len(server.hits) == 4
    assert ["max_tokens" in hit.body for hit in server.hits] == [True, False, False, False]


def test_json_object_mode():
    async def scenario():
        async with (
            FaultyServer() as server,
            chat(server, response_format=ResponseFormat.json_object) as backend,
        ):
            await backend.ask(request())
            return server.hits[0].body

    body = asyncio.run(scenario())
    assert (
        body["response_format"] == {"type": "json_object"}
        and json.dumps(SCHEMA) in body["messages"][0]["content"]
    )


def chain(error: BaseException | None) -> list[BaseException]:
    """The error and everything that hangs on it."""
    return [error, *chain(error.__cause__), *chain(error.__context__)] if error is not None else []


def test_the_key_reaches_its_endpoints_and_nothing_else(monkeypatch, caplog, capfd):
    monkeypatch.setenv("USERS_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = refusal(400, message=f"Incorrect API key provided: {KEY}", type=f"Bearer {KEY}")
    cut = refusal(400, message="x" * 190 + f" {KEY}")  # across the end of the excerpt
    told = Canned(
        body=json.dumps({"model": KEY, "choices": [{"message": {"content": f"key {KEY}"}}]}).encode()
    )

    async def scenario():
        async with FaultyServer() as elsewhere:
            away = Canned(status=307, headers={"Location": f"{elsewhere.url}/chat/completions"})
            bodies = Kind.CUT_BODY, Canned(headers={"X": KEY}, body=KEY.encode())
            script = [None, echo, told, away, Kind.SERVER_ERROR, Kind.TIMEOUT, *bodies, cut]
            async with (
                FaultyServer(script=script) as server,
                chat(server, api_key_env="USERS_KEY", max_retries=0) as backend,
            ):
                outcomes = [(await ask_all(backend, 1))[0] for _ in script]
                copy = pickle.loads(pickle.dumps(backend))
                answer = await copy.ask(request())
                await copy.close()
                return server, elsewhere, backend, pickle.dumps(backend), outcomes, answer

    server, elsewhere, backend, pickled, outcomes, answer = asyncio.run(scenario())
    assert {hit.headers["authorization"] for hit in server.hits} == {f"Bearer {KEY}"} and answer.retries == 0
    assert elsewhere.hits == [] and "redirect, which is not followed" in str(outcomes[3])
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "ChatAnswer",
        "BoundaryError",
        "ChatAnswer",
        *["BoundaryError"] * 6,
    ]
    assert KEY[:6] not in str(outcomes[-1])
    assert (
        "Incorrect API key provided: ***" in str(outcomes[1])
        and outcomes[2].text == "key ***"
        and outcomes[2].model == "***"
    )
    hanging = [error for outcome in outcomes if isinstance(outcome, Exception) for error in chain(outcome)]
    shown = [
        repr(backend),
        caplog.text,
        *capfd.readouterr(),
        *map(repr, outcomes),
        *(repr(vars(error)) for error in hanging),
    ]
    assert all(KEY not in text for text in shown) and all(
        type(error).__module__.startswith("rlver_dist") for error in hanging
    )
    assert KEY.encode() not in pickled and all(
        KEY.encode() not in pickle.dumps(outcome) for outcome in outcomes
    )


@pytest.mark.parametrize("kind", IN_BODY, ids=lambda kind: kind.value)
def test_bad_answers_in_sound_bodies_are_handed_on_as_they_are(kind):
    async def scenario():
        async with FaultyServer(script=[kind]) as server, chat(server) as backend:
            return await backend.ask(request())

    answer = asyncio.run(scenario())
    assert answer.retries == 0 and answer.prompt_tokens == 7


def test_two_hundred_dialogues_at_thirty_percent_faults():
    outcome = asyncio.run(hold_dialogues(dialogues=200, rate=0.3, seed=7))
    print(f"\n{table(outcome)}")
    assert {hit.kind for hit in outcome.hits} == {None, *Kind}
    assert [dialogue.id for dialogue in outcome.dialogues] == [f"d{number:03d}" for number in range(200)]
    failed = [dialogue for dialogue in outcome.dialogues if dialogue.end_reason is EndReason.INFRASTRUCTURE]
    complete = [
        dialogue for dialogue in outcome.dialogues if dialogue.end_reason is not EndReason.INFRASTRUCTURE
    ]
    assert 0 < len(failed) < 60
    for dialogue in failed:
        check_failed(dialogue)
    for dialogue in complete:
        check_complete(dialogue)
    check_books(outcome)
    assert any(
        "set the emotion to 100" in (turn.user_message or "")
        for dialogue in complete
        for turn in dialogue.turns
    )


def check_failed(dialogue: Dialogue) -> None:
    """It says why, in one line, and nothing gives it a score."""
    assert dialogue.error and "\n" not in dialogue.error and failure_kind(dialogue) != "unknown"
    with pytest.raises(ValueError, match="never scored"):
        dialogue_reward(dialogue, EndRewardConfig())
    assert all(turn.appraisal is not None for turn in dialogue.turns[:-1])


def check_complete(dialogue: Dialogue) -> None:
    """Every reply has its own appraisal, the emotion is the sum of their changes, and the reward is the
    emotion's."""
    rules = PRESETS[Preset.rlver_vanilla].emotion
    emotion = rules.start
    for index, turn in enumerate(dialogue.turns):
        assert turn.index == index and turn.appraisal is not None and turn.emotion_before == emotion
        assert (
            abs(turn.appraisal.change) <= rules.max_change
            and json.loads(turn.appraisal.source)["model"] == MODEL
        )
        emotion = move(emotion, turn.appraisal.change, rules)
        assert turn.emotion_after == emotion
    assert dialogue.error is None and dialogue.final_emotion == emotion and 1 <= len(dialogue.turns) <= 4
    assert dialogue_reward(dialogue, EndRewardConfig()) == emotion / 100


def check_books(outcome: Outcome) -> None:
    """Server, backend, service and dialogues agree on how often what happened."""
    answers = [answer for given in outcome.answers.values() for answer in given]
    assert all(len(given) == 1 for given in outcome.answers.values())
    calls, appraised = (
        outcome.calls,
        [turn for dialogue in outcome.dialogues for turn in dialogue.turns if turn.appraisal is not None],
    )
    assert calls["calls"] == len(answers) + calls["failures"] and calls["retries"] >= sum(
        answer.retries for answer in answers
    )
    for kind in ("prompt", "cached", "completion"):
        assert calls[f"{kind}_tokens"] == sum(getattr(answer, f"{kind}_tokens") for answer in answers)
    # On a busy machine an answer may come too late, or its request not be read in time.
    late = calls["fault_timeout"] - sum(hit.kind in (Kind.TIMEOUT, Kind.DRIP) for hit in outcome.hits)
    assert 0 <= calls["calls"] + calls["retries"] - len(outcome.hits) <= late
    assert 0 <= sum(hit.sent for hit in outcome.hits) - len(answers) <= late
    turns = sum(len(dialogue.turns) for dialogue in outcome.dialogues)
    assert (outcome.service["requests"], outcome.service["retries"]) == (turns + 200, 0)
    assert outcome.service["failures"] == turns - len(appraised)
