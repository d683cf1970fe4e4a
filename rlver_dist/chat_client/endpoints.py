"""Which endpoint a call goes to, and when: failover, rests, the waits that endpoints ask for, and the pace of
calls.

Times are seconds of the event loop's clock.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from rlver_dist.chat_client.wire import Dialect
from rlver_dist.errors import BudgetError, ConfigError

FAILURES_BEFORE_REST = 3
"""Failures in a row after which an endpoint rests while another one works."""
FIRST_BACKOFF_S = 0.5
"""Longest wait before the first retry; it doubles with each further one."""
LONGEST_RETRY_AFTER_S = 86400.0
"""A day; whoever asks for more is not waited for anyway, and larger numbers may be a mistake."""
SHORTEST_KEY = 8
"""A key is taken out of every text that an endpoint sends, and shorter ones stand in texts by chance."""


def key_from_environment(name: str) -> str:
    """The key in the environment variable `name`; empty for an empty name.

    Raises:
        ConfigError: there is none, or none that a header can carry; the message holds no part of the key.
    """
    if not name:
        return ""
    where = "simulator.openai.api_key_env"
    # Who puts the key itself here must not find it in an error line, so the value is not repeated.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ConfigError(
            f"{where}: not the name of an environment variable (capitals, digits, _); the key itself "
            f"belongs in the variable"
        )
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"{where}={name}: not set in the environment; export it, or leave the name empty where no key "
            f"is needed"
        )
    if len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"{where}={name}: the variable holds fewer than {SHORTEST_KEY} characters, which is no key; "
            f"leave the name empty"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{where}={name}: the variable holds blanks or other characters that no key has; export the key "
            f"alone"
        )
    return key


def backoff_s(retry: int, longest_s: float, rng: random.Random) -> float:
    """Seconds before the `retry`-th retry (from 1): uniform between 0 and a bound that doubles up to
    `longest_s`.

    Exponential backoff with full jitter (Brooker 2015, "Exponential Backoff And Jitter").
    """
    # The exponent has a bound, since any number of retries may be configured and a float overflows.
    return rng.uniform(0.0, min(longest_s, FIRST_BACKOFF_S * 2.0 ** min(retry - 1, 32)))


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as seconds or as an HTTP date (RFC 9110, section
    10.2.3).

    None where there is none or it cannot be read; never negative, at most a day.
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return min(float(text), LONGEST_RETRY_AFTER_S)
    # Anything else, "soon" for example, is no date, and what cannot be read asks for nothing.
    try:
        until = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    # A date without a zone is meant in UTC.
    seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


class Pacer:
    """Starts at most `per_minute` calls a minute, evenly spaced; 0 sets no limit."""

    def __init__(self, per_minute: float) -> None:
        self._gap_s = 60.0 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0

    async def wait(self) -> None:
        """Return when the next call may start. A place that a cancelled caller held stays unused."""
        if self._gap_s == 0:
            return
        # Places are given out before anybody sleeps, so callers need no lock and keep their order.
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + self._gap_s
        await asyncio.sleep(start - now)


@dataclass(kw_only=True, slots=True, eq=False)
class Endpoint:
    """One address and how it has been doing.

    Attributes:
        url: of chat completions.
        name: host and port, for messages.
        dialect: what has to be said differently there.
        failures: in a row.
        rests_until: until then another endpoint is preferred, if there is one.
        closed_until: the endpoint asked for no call before then, and gets none.
        exhausted: its line about quota or credit that is used up; None while there is some.
    """

    url: str
    name: str
    dialect: Dialect = field(default_factory=Dialect)
    failures: int = 0
    rests_until: float = 0.0
    closed_until: float = 0.0
    exhausted: str | None = None

    def succeeded(self) -> None:
        """It answered."""
        self.failures = 0
        self.rests_until = 0.0

    def failed(self, now: float, rest_s: float) -> None:
        """It did not; after some failures in a row it rests."""
        self.failures += 1
        if self.failures >= FAILURES_BEFORE_REST:
            self.rests_until = now + rest_s


def parse_address(address: str) -> Endpoint:
    """The endpoint at a base address such as `https://api.openai.com/v1`.

    Raises:
        ConfigError: it has no host, or holds credentials or a query; the message does not repeat it then.
    """
    where = "simulator.openai.endpoints"
    try:
        url = urlsplit(address)
        has_port = url.port is not None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; use addresses such as http://127.0.0.1:8000/v1") from None
    if "@" in url.netloc or url.query or url.fragment:
        raise ConfigError(
            f"{where}: an address holds credentials or a query; put the key into the variable named by "
            f"api_key_env"
        )
    if not url.hostname:
        raise ConfigError(
            f"{where}: {address!r} names no host; use addresses such as http://127.0.0.1:8000/v1"
        )
    name = f"{url.hostname}:{url.port}" if has_port else url.hostname
    return Endpoint(url=f"{address.rstrip('/')}/chat/completions", name=name)


def select_endpoint(
    endpoints: Sequence[Endpoint],
    *,
    now: float,
    refused_by: Collection[Endpoint],
    failed_last: Endpoint | None,
) -> Endpoint | None:
    """The endpoint for the next attempt; None where every one has refused this call.

    The first in order that is neither closed, resting, nor the one that has just failed; where all are, the
    one that opens first, and rests do not count then, since a rest only helps where somebody else can work.

    Raises:
        BudgetError: quota or credit is used up at every endpoint.
    """
    with_quota = [endpoint for endpoint in endpoints if endpoint.exhausted is None]
    if not with_quota:
        raise BudgetError("; ".join(endpoint.exhausted or "" for endpoint in endpoints))
    candidates = [endpoint for endpoint in with_quota if endpoint not in refused_by]
    # `min` takes the first of equals, so the configured order decides where nothing else does.
    return min(
        candidates,
        key=lambda endpoint: (
            max(endpoint.closed_until - now, 0.0),
            endpoint.rests_until > now,
            endpoint is failed_last,
        ),
        default=None,
    )
