"""The reward service: many dialogues ask at once, none waits for another's user longer than it has to, the
event loop stays free.

A plain class; `cluster/` wraps it as an actor, and any number of replicas may run, because a simulated user
is a pure function of the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from rlver_dist.errors import RlverError
from rlver_dist.latency import latency_metrics
from rlver_dist.simulator.protocol import AsyncUserSimulator, UserRequest, UserResponse, UserSimulator


@dataclass(kw_only=True, slots=True)
class _Window:
    """What happened since the metrics were last read."""

    latencies_s: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    queue_depth_max: int = 0
    requests: int = 0
    retries: int = 0
    failures: int = 0


class RewardService:
    """Stands in front of one simulator: a computing one gets a single worker thread, so that it needs no
    lock; a waiting one is awaited as often as is asked.

    An answer is handed over as soon as it is there. All state belongs to the event loop's thread.
    """

    def __init__(
        self,
        simulator: UserSimulator | AsyncUserSimulator,
        *,
        max_batch: int = 64,
        max_remembered: int = 65536,
    ) -> None:
        """`max_remembered` bounds the keys whose content is remembered in order to tell a retry from a mix-up
        (about 200 bytes each)."""
        self._window = _Window()
        self._worker: _Worker | None = None
        self._answer: Callable[[UserRequest], Awaitable[UserResponse]]
        if inspect.iscoroutinefunction(simulator.respond):
            self._answer = simulator.respond
        else:
            self._worker = _Worker(
                simulator.respond, max_batch, lambda size: self._window.batch_sizes.append(size)
            )
            self._answer = self._worker.run
        self._max_remembered = max_remembered
        self._waiting = 0
        self._seen: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    async def respond(self, request: UserRequest) -> UserResponse:
        """The simulated user's answer. The same request asked again gets an equal answer, as far as the
        simulator is deterministic.

        Raises:
            RlverError: (dialogue_id, turn_index) was asked before with other content, or whatever the
                simulator raises for this request; other requests are not affected.
        """
        self._remember(request)
        self._waiting += 1
        self._window.queue_depth_max = max(self._window.queue_depth_max, self._waiting)
        asked_at = time.perf_counter()
        try:
            answer = await self._answer(request)
        except Exception:
            self._window.failures += 1
            raise
        finally:
            self._waiting -= 1
        self._window.latencies_s.append(time.perf_counter() - asked_at)
        return answer

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, and the window starts anew; means, latencies (seconds) only where
        anything was answered."""
        window, self._window = self._window, _Window()
        values = {
            "requests": float(window.requests),
            "retries": float(window.retries),
            "failures": float(window.failures),
            "queue_depth_max": float(window.queue_depth_max),
        }
        if window.batch_sizes:
            values["batch_size_mean"] = sum(window.batch_sizes) / len(window.batch_sizes)
        return {**values, **latency_metrics("latency", window.latencies_s)}

    def close(self) -> None:
        """Stop the worker thread after the request at hand; those still queued are cancelled."""
        if self._worker is not None:
            self._worker.close()

    def _remember(self, request: UserRequest) -> None:
        key = (request.dialogue_id, request.turn_index)
        digest = hashlib.sha256(repr(request).encode()).digest()
        known = self._seen.get(key)
        if known is not None and known != digest:
            raise RlverError(
                f"dialogue {request.dialogue_id}, turn {request.turn_index}: asked before with other "
                f"content; "
                "a retry must repeat the request, and another dialogue needs another id"
            )
        self._window.requests += 1
        self._window.retries += known is not None
        self._seen[key] = digest
        self._seen.move_to_end(key)
        while len(self._seen) > self._max_remembered:
            self._seen.popitem(last=False)


@dataclass(kw_only=True, slots=True)
class _Pending:
    request: UserRequest
    future: asyncio.Future[UserResponse]


class _Worker:
    """One thread behind a queue; drains it in batches, so that a handful of hops serve many requests."""

    def __init__(
        self, respond: Callable[[UserRequest], Any], max_batch: int, on_batch: Callable[[int], None]
    ) -> None:
        self._respond = respond
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulator")
        self._queue: deque[_Pending] = deque()
        self._drain_task: asyncio.Task[None] | None = None

    async def run(self, request: UserRequest) -> UserResponse:
        loop = asyncio.get_running_loop()
        pending = _Pending(request=request, future=loop.create_future())
        self._queue.append(pending)
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = loop.create_task(self._drain())
        return await pending.future

    def close(self) -> None:
        if self._drain_task is not None:
            self._drain_task.cancel()
        while self._queue:
            self._queue.popleft().future.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            self._on_batch(len(batch))
            await loop.run_in_executor(self._thread, self._answer, loop, batch)

    def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[_Pending]) -> None:
        """In the worker thread: answer one by one; an error belongs to its own request."""
        for pending in batch:
            outcome: UserResponse | Exception
            try:
                outcome = self._respond(pending.request)
            except Exception as error:
                outcome = error
            loop.call_soon_threadsafe(_deliver, pending.future, outcome)


def _deliver(future: asyncio.Future[UserResponse], outcome: UserResponse | Exception) -> None:
    # The caller may have given up waiting.
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
