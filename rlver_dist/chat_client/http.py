"""A chat model behind OpenAI-compatible endpoints, hosted or one's own (`vllm serve`).

Every attempt has one deadline from the connection to the last byte, and a body may only be so long. A failed
attempt is repeated, at another endpoint where there is one, with exponential backoff; how long an endpoint
asks to wait is obeyed. The key is read from the environment, sent to the configured addresses alone, and
stands in no message, pickle or log. Failed attempts are handed around as values, not as exceptions, since
those of the HTTP client hold the request and with it the key.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import httpx

from rlver_dist.chat_client.budget import Budget, Usage, tokens_of
from rlver_dist.chat_client.endpoints import (
    Endpoint,
    Pacer,
    backoff_s,
    key_from_environment,
    parse_address,
    parse_retry_after,
    select_endpoint,
)
from rlver_dist.chat_client.http_metrics import HttpWindow
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.chat_client.wire import Failure, Fault, Reply, read_error, read_success, request_body
from rlver_dist.config.simulator import HttpChatConfig
from rlver_dist.errors import BoundaryError, BudgetError

MAX_BODY_BYTES = 1 << 20
"""A response beyond it is dropped unread; answers have a few thousand bytes."""
LONGEST_CONNECT_S = 10.0
"""A host that takes longer to connect to is down; the rest of an attempt's time belongs to the answer."""
LONGEST_JITTER_S = 1.0
"""Longest time by which calls that wait for the same moment are spread."""
NEVER_SENT = (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.ProxyError)
"""Failures before a request left: the endpoint cannot have worked for it, so nothing is charged."""


class HttpChat:
    """A `ChatBackend` over HTTP; all state belongs to the event loop's thread. A pickle holds the
    configuration alone."""

    def __init__(self, *, config: HttpChatConfig) -> None:
        """Read the key from the environment; nothing is sent yet.

        Raises:
            ConfigError: the environment lacks the key, it cannot stand in a header, or an address holds
                credentials.
        """
        self._config = config
        self._key = key_from_environment(config.api_key_env)
        self._endpoints = [parse_address(address) for address in config.addresses]
        # As long as all attempts may take: whoever asks for a longer wait does not want this call.
        self._patience_s = (config.max_retries + 1) * config.timeout_s
        self._budget = Budget(config)
        self._pacer = Pacer(config.requests_per_minute)
        self._slots = asyncio.Semaphore(config.max_concurrent)
        # Not seeded: replicas that fail together must not come back together.
        self._rng = random.Random()
        self._window = HttpWindow()
        self._client = httpx.AsyncClient(
            # A redirect would take the key to an address that nobody configured.
            follow_redirects=False,
            # No other time-out of the client: that of a read starts anew with every byte, and one deadline
            # holds for a whole attempt.
            timeout=httpx.Timeout(None, connect=min(config.timeout_s, LONGEST_CONNECT_S)),
            # The semaphore limits the calls already.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=config.max_concurrent),
        )
        # They write a line a call, and every header of a response.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def __repr__(self) -> str:
        return (
            f"HttpChat(model={self._config.model!r}, "
            f"endpoints={[endpoint.name for endpoint in self._endpoints]})"
        )

    def __reduce__(self) -> tuple[partial[HttpChat], tuple[()]]:
        # The key must not travel: whoever unpickles this reads it from an environment of its own.
        return partial(HttpChat, config=self._config), ()

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The model's answer, tried for as `ChatBackend` and the head of this module say. Where the caller is
        cancelled, so is the attempt.

        A wait that endpoints ask for may last until (max_retries + 1) x timeout_s after the first attempt.
        Where all of them ask for a longer one, it is a `BudgetError`: to go on later is all that is left.
        """
        # One call counts once, however it ends.
        started = time.perf_counter()
        try:
            reply, retries = await self._persist(request)
        except (BoundaryError, BudgetError):
            self._window.fail()
            raise
        except asyncio.CancelledError:
            self._window.cancel()
            raise
        seconds = time.perf_counter() - started
        self._window.answered(seconds)
        usage = reply.usage
        return ChatAnswer(
            text=reply.text,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            seconds=seconds,
            retries=retries,
            model=reply.model or self._config.model,
        )

    def metrics(self) -> dict[str, float]:
        """Figures since the last call (`HttpWindow`); the budget counts `cost` and `lost_cost`."""
        window, self._window = self._window, HttpWindow()
        return window.values()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _persist(self, request: ChatRequest) -> tuple[Reply, int]:
        """Try until there is a reply; returns it with the number of retries."""
        config = self._config
        loop = asyncio.get_running_loop()
        refused_by: set[Endpoint] = set()
        reasons: list[str] = []
        transient = 0
        failed_last: Endpoint | None = None
        give_up_at: float | None = None
        while True:
            # A slot is held for one attempt, not for the sleep after it: others may use the time.
            async with self._slots:
                # The clock starts with the first slot, since waiting for one is no fault of the endpoints.
                give_up_at = give_up_at or loop.time() + self._patience_s
                endpoint = await self._open_endpoint(refused_by, failed_last, give_up_at)
                if endpoint is None:
                    raise _given_up(request, reasons)
                self._window.retries += bool(reasons)
                outcome = await self._attempt(endpoint, request)
            self._account(endpoint, outcome)
            if isinstance(outcome, Reply):
                return outcome, len(reasons)
            reasons.append(f"{endpoint.name}: {outcome.fault.value}: {outcome.text}")
            failed_last = endpoint
            # The same call would be refused again; in the endpoint's own dialect it may be taken.
            if outcome.fault is Fault.REFUSED and not outcome.can_adapt:
                refused_by.add(endpoint)
            # Neither is mended by waiting. The loop ends all the same: an endpoint refuses a call for good
            # once, adapts its dialect twice at most, and is out once its quota is used up.
            if outcome.fault in (Fault.REFUSED, Fault.QUOTA):
                continue
            transient += 1
            if transient > config.max_retries:
                raise _given_up(request, reasons)
            await asyncio.sleep(backoff_s(transient, config.max_backoff_s, self._rng))

    async def _open_endpoint(
        self, refused_by: set[Endpoint], failed_last: Endpoint | None, give_up_at: float
    ) -> Endpoint | None:
        """The endpoint for the next attempt, once it may be asked; None where none is left or it is too late.

        Raises:
            BudgetError: nothing is left to spend, or every endpoint asks for a wait beyond all patience.
        """
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            endpoint = select_endpoint(
                self._endpoints, now=now, refused_by=refused_by, failed_last=failed_last
            )
            if endpoint is None:
                return None
            wait_s = max(endpoint.closed_until - now, 0.0)
            if wait_s > self._patience_s:
                raise BudgetError(
                    f"{endpoint.name}: asks for no call within {wait_s:.0f} s (Retry-After); resume the run "
                    f"after that"
                )
            if wait_s > 0 and now + wait_s > give_up_at:
                return None
            if wait_s > 0:
                # Spread, or all calls that wait would start at the same moment and be turned away again.
                jitter_s = self._rng.uniform(0.0, min(wait_s, LONGEST_JITTER_S))
                await asyncio.sleep(wait_s + jitter_s)
                continue
            await self._pacer.wait()
            # While this call waited for its turn, another's answer may have closed the endpoint.
            if endpoint.closed_until <= loop.time():
                self._budget.check()
                return endpoint

    async def _attempt(self, endpoint: Endpoint, request: ChatRequest) -> Reply | Failure:
        """One attempt within its deadline. Cancellation passes, and what the attempt may have cost is
        counted."""
        config = self._config
        dialect = endpoint.dialect
        body = request_body(
            request, model=config.model, response_format=config.response_format, dialect=dialect
        )
        # What the attempt can cost at most, counted where the endpoint never says what it used: a limit on
        # money has to hold also where answers get lost.
        most = Usage(prompt_tokens=tokens_of(body), cached_tokens=0, completion_tokens=request.max_tokens)
        try:
            async with asyncio.timeout(config.timeout_s):
                outcome = await self._exchange(endpoint, body)
        except TimeoutError:
            outcome = Failure(
                fault=Fault.TIMEOUT, text=f"no whole answer within {config.timeout_s:g} s", lost=True
            )
        # The endpoint goes on working for a caller who has left, and may charge for it.
        except asyncio.CancelledError:
            self._window.add_lost(most, self._budget.charge(most))
            raise
        except httpx.TimeoutException:
            outcome = Failure(fault=Fault.TIMEOUT, text="no connection in time")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            line = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            outcome = Failure(fault=Fault.CONNECTION, text=line, lost=not isinstance(error, NEVER_SENT))
        if isinstance(outcome, Reply):
            return replace(
                outcome, text=self._without_key(outcome.text), model=self._without_key(outcome.model)
            )
        if outcome.lost:
            self._window.add_lost(most, self._budget.charge(most))
        return replace(
            outcome, text=self._without_key(outcome.text), can_adapt=dialect.adapted(outcome) != dialect
        )

    async def _exchange(self, endpoint: Endpoint, body: bytes) -> Reply | Failure:
        # Identity: a small compressed body could unpack into a huge one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        async with self._client.stream("POST", endpoint.url, content=body, headers=headers) as response:
            raw = bytearray()
            async for chunk in response.aiter_raw():
                raw += chunk
                # Leaving the block closes the connection, so what is still to come is not read.
                if len(raw) > MAX_BODY_BYTES:
                    return Failure(
                        fault=Fault.TOO_LARGE, text=f"a body of more than {MAX_BODY_BYTES} bytes", lost=True
                    )
            status = response.status_code
            wait_s = parse_retry_after(response.headers.get("Retry-After"), datetime.now(UTC))
        if status == 200:
            return read_success(bytes(raw), sent=body)
        # The key is taken out before the message is cut: half a key would not be found afterwards.
        text = self._without_key(raw.decode("utf-8", "replace"))
        return read_error(status, text.encode(), retry_after_s=wait_s)

    def _account(self, endpoint: Endpoint, outcome: Reply | Failure) -> None:
        """Count an attempt, once, and remember how its endpoint did."""
        if outcome.usage is not None:
            self._window.add_usage(outcome.usage, self._budget.charge(outcome.usage))
        if isinstance(outcome, Reply):
            endpoint.succeeded()
            return
        self._window.faults[outcome.fault] += 1
        now = asyncio.get_running_loop().time()
        # The latest wait that was asked for: answers of calls in flight come in any order.
        if outcome.retry_after_s is not None:
            endpoint.closed_until = max(endpoint.closed_until, now + outcome.retry_after_s)
        if outcome.fault is Fault.QUOTA:
            endpoint.exhausted = (
                f"{endpoint.name}: quota or credit is used up: {outcome.text}; top it up and resume the run"
            )
        elif outcome.fault is Fault.REFUSED:
            # No failure of the endpoint: it works, and refuses this call or this dialect.
            endpoint.dialect = endpoint.dialect.adapted(outcome)
        else:
            endpoint.failed(now, self._config.max_backoff_s)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def divide_limits(config: HttpChatConfig, num_backends: int) -> HttpChatConfig:
    """`config` for each of `num_backends` backends that share no state: with its part of every limit that
    holds for all of them together."""
    return replace(
        config,
        max_concurrent=max(config.max_concurrent // num_backends, 1),
        requests_per_minute=config.requests_per_minute / num_backends,
        # Rounded up: a limit of 0 tokens would mean that there is none.
        max_tokens_total=-(-config.max_tokens_total // num_backends),
        max_cost=config.max_cost / num_backends,
    )


def _given_up(request: ChatRequest, reasons: list[str]) -> BoundaryError:
    why = (
        f" in {len(reasons)} attempts; last: {reasons[-1]}"
        if reasons
        else " in time: the endpoint was closed or the queue too long"
    )
    return BoundaryError(f"{request.key}: no answer{why}")
