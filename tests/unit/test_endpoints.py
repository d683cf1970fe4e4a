"""Where and when the next attempt goes, what it may cost, and the key: by hand-computed numbers."""

import asyncio
import random
import statistics
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.chat_client.budget import Budget, Prices, Usage, tokens_of
from rlver_dist.chat_client.endpoints import (
    Endpoint,
    Pacer,
    backoff_s,
    key_from_environment,
    parse_address,
    parse_retry_after,
    select_endpoint,
)
from rlver_dist.chat_client.http import divide_limits
from rlver_dist.config.simulator import HttpChatConfig
from rlver_dist.errors import BudgetError, ConfigError

NOW = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (" 0 ", 0),
        ("1.5", 1.5),
        ("999999999", 86400),
        ("Tue, 01 Jan 2030 12:00:30 GMT", 30),
        ("Tue, 01 Jan 2030 11:00:00 GMT", 0),
        ("Tue, 01 Jan 2030 13:00:10 +0100", 10),
        ("Wed, 01 Jan 2031 12:00:00 GMT", 86400),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("1e5", None),
        ("9" * 400, None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, NOW) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_none_or_at_most_a_day(value: str) -> None:
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or 0 <= seconds <= 86400


def test_backoff_doubles_up_to_its_limit_with_full_jitter() -> None:
    rng = random.Random(0)
    for retry, bound in [(1, 0.5), (2, 1.0), (3, 2.0), (6, 16.0), (7, 30.0), (500, 30.0)]:
        waits = [backoff_s(retry, 30.0, rng) for _ in range(400)]
        assert min(waits) >= 0 and max(waits) <= bound
        assert statistics.fmean(waits) == pytest.approx(bound / 2, rel=0.15)


def endpoints(count: int = 3) -> list[Endpoint]:
    return [parse_address(f"http://host{index}:80/v1") for index in range(count)]


def pick(among: list[Endpoint], now: float = 100.0, refused_by=(), failed_last=None) -> Endpoint | None:
    return select_endpoint(among, now=now, refused_by=refused_by, failed_last=failed_last)


def test_first_that_works_is_chosen() -> None:
    first, second, third = among = endpoints()
    assert pick(among) is first
    assert pick(among, failed_last=first) is second
    assert pick(among, refused_by={first, second}) is third
    assert pick(among, refused_by=set(among)) is None
    assert pick([first], failed_last=first) is first


def test_an_endpoint_rests_after_three_failures_in_a_row() -> None:
    first, second, _ = among = endpoints()
    first.failed(100.0, 30.0)
    first.failed(100.0, 30.0)
    first.succeeded()
    first.failed(100.0, 30.0)
    first.failed(100.0, 30.0)
    assert pick(among) is first
    first.failed(100.0, 30.0)
    assert pick(among) is second and pick(among, now=130.0) is first
    first.failed(130.0, 30.0)
    assert pick(among, now=131.0) is second
    assert pick([first], now=131.0) is first


def test_a_closed_endpoint_is_last_and_the_first_to_open_is_waited_for() -> None:
    first, second, third = among = endpoints()
    first.closed_until, second.closed_until = 200.0, 150.0
    third.rests_until = 140.0
    assert pick(among) is third
    third.closed_until = 300.0
    assert pick(among) is second


def test_quota_used_up_everywhere_is_the_end() -> None:
    first, second = among = endpoints(2)
    first.exhausted = "host0: quota is used up"
    assert pick(among) is second and pick(among, refused_by={second}) is None
    second.exhausted = "host1: no credit"
    with pytest.raises(BudgetError, match="host0: quota is used up; host1: no credit"):
        pick(among)


def test_addresses() -> None:
    endpoint = parse_address("https://api.example.com/v1/")
    assert (endpoint.url, endpoint.name) == ("https://api.example.com/v1/chat/completions", "api.example.com")
    assert parse_address("http://127.0.0.1:8000/v1").name == "127.0.0.1:8000"


@pytest.mark.parametrize(
    "address",
    ["http://user:hunter2@host/v1", "https://host/v1?key=hunter2", "http://host:hunter2/v1", "http:///v1"],
)
def test_addresses_with_a_secret_or_without_a_host_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"simulator\.openai\.endpoints") as caught:
        parse_address(address)
    if "@" in address or "?" in address:
        assert "hunter2" not in str(caught.value)


def test_keys_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sk-hunter2\n")
    assert key_from_environment("MY_KEY") == "sk-hunter2" and key_from_environment("") == ""
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="api_key_env=MY_KEY: not set"):
        key_from_environment("MY_KEY")
    for value in ("sk-hun\nter2", "Bearer sk-hunter2", "sk-\u00e9hunter2"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(ConfigError, match="api_key_env=MY_KEY") as caught:
            key_from_environment("MY_KEY")
        assert "hunter2" not in str(caught.value) and "ter2" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "1")
    with pytest.raises(ConfigError, match="api_key_env=MY_KEY: the variable holds fewer than 8 characters"):
        key_from_environment("MY_KEY")
    with pytest.raises(ConfigError, match="api_key_env: not the name") as caught:
        key_from_environment("sk-hunter2")
    assert "hunter2" not in str(caught.value)


def test_pacer_spaces_starts_evenly() -> None:
    async def starts() -> list[float]:
        pacer, loop = Pacer(1200.0), asyncio.get_running_loop()
        begun = loop.time()

        async def start() -> float:
            await pacer.wait()
            return loop.time() - begun

        return sorted(await asyncio.gather(*(start() for _ in range(5))))

    times = asyncio.run(starts())
    assert all(time >= 0.05 * index - 0.005 for index, time in enumerate(times))


def test_cost_by_hand() -> None:
    prices = Prices(prompt=2.0, cached=0.5, completion=8.0)
    # 600 fresh at 2, 400 cached at 0.5, 100 sampled at 8 per million.
    assert prices.cost(prompt_tokens=1000, cached_tokens=400, completion_tokens=100) == pytest.approx(0.0022)
    uncached = Prices(prompt=2.0, completion=8.0)
    assert uncached.cost(prompt_tokens=1000, cached_tokens=400, completion_tokens=100) == pytest.approx(
        0.0028
    )
    assert [tokens_of(b"x" * size) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_budget_ends_at_its_limit_and_names_the_option() -> None:
    usage = Usage(prompt_tokens=80, cached_tokens=30, completion_tokens=20)
    tokens = Budget(HttpChatConfig(model="m", max_tokens_total=200))
    for _ in range(2):
        tokens.check()
        assert tokens.charge(usage) == 0.0
    with pytest.raises(BudgetError, match=r"simulator\.openai\.max_tokens_total=200: used up \(200 tokens\)"):
        tokens.check()
    money = Budget(
        HttpChatConfig(
            model="m", max_cost=0.001, price_per_million_prompt=5.0, price_per_million_completion=10.0
        )
    )
    # 80 x 5 + 20 x 10 = 600 per million: twice that is above 0.001.
    assert money.charge(usage) == pytest.approx(0.0006)
    money.check()
    money.charge(usage)
    with pytest.raises(BudgetError, match=r"simulator\.openai\.max_cost=0\.001: used up \(0\.0012\)"):
        money.check()


def test_shares_add_up_to_the_whole() -> None:
    whole = HttpChatConfig(
        model="m",
        max_concurrent=10,
        requests_per_minute=90.0,
        max_tokens_total=100,
        max_cost=6.0,
        price_per_million_prompt=1.0,
    )
    part = divide_limits(whole, 3)
    assert (part.max_concurrent, part.requests_per_minute, part.max_tokens_total, part.max_cost) == (
        3,
        30.0,
        34,
        2.0,
    )
    assert divide_limits(whole, 20).max_concurrent == 1
    assert divide_limits(HttpChatConfig(model="m"), 4).max_tokens_total == 0
