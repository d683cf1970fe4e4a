"""The reward service: many dialogues ask at once, one thread answers, and the event loop stays free.

A plain class; `cluster/` wraps it as an actor, and any number of replicas may run, because a simulated user is a pure function
of the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rlver_dist.errors import RlverError
from rlver_dist.simulator.protocol import UserRequest, UserResponse, UserSimulator


@dataclass(kw_only=True, slots=True)
class _Pending:
    request: UserRequest
    future: asyncio.Future[UserResponse]
    asked_at: float


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
    """A queue in front of one simulator.

    Requests are drained in batches by a single worker thread, so the simulator needs no lock; each answer is handed over as
    soon as it is there. All other state belongs to the event loop's thread.
    """

    def __init__(self, simulator: UserSimulator, *, max_batch: int = 64, max_remembered: int = 65536) -> None:
        """`max_remembered` bounds the keys whose content is remembered in order to tell a retry from a mix-up (about 200 bytes each)."""
        self._simulator = simulator
        self._max_batch = max_batch
        self._max_remembered = max_remembered
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulator")
        self._queue: deque[_Pending] = deque()
        self._drain_task: asyncio.Task[None] | None = None
        self._seen: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._window = _Window()

    async def respond(self, request: UserRequest) -> UserResponse:
        """The simulated user's answer. The same request asked again gets an equal answer.

        Raises:
            RlverError: (dialogue_id, turn_index) was asked before with other content, or whatever the simulator raises for
                this request; other requests are not affected.
        """
        self._remember(request)
        loop = asyncio.get_running_loop()
        pending = _Pending(request=request, future=loop.create_future(), asked_at=time.perf_counter())
        self._queue.append(pending)
        self._window.queue_depth_max = max(self._window.queue_depth_max, len(self._queue))
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = loop.create_task(self._drain())
        return await pending.future

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, and the window starts anew; means, latencies (seconds) only where anything was answered."""
        window, self._window = self._window, _Window()
        values = {
            "requests": float(window.requests),
            "retries": float(window.retries),
            "failures": float(window.failures),
            "queue_depth_max": float(window.queue_depth_max),
        }
        if window.batch_sizes:
            values["batch_size_mean"] = sum(window.batch_sizes) / len(window.batch_sizes)
        if window.latencies_s:
            ordered = sorted(window.latencies_s)
            values["latency_mean_s"] = sum(ordered) / len(ordered)
            values["latency_p50_s"] = nearest_rank(ordered, 0.50)
            values["latency_p95_s"] = nearest_rank(ordered, 0.95)
            values["latency_max_s"] = ordered[-1]
        return values

    def close(self) -> None:
        """Stop the worker thread after the request at hand; those still queued are cancelled."""
        if self._drain_task is not None:
            self._drain_task.cancel()
        while self._queue:
            self._queue.popleft().future.cancel()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _remember(self, request: UserRequest) -> None:
        key = (request.dialogue_id, request.turn_index)
        digest = hashlib.sha256(repr(request).encode()).digest()
        known = self._seen.get(key)
        if known is not None and known != digest:
            raise RlverError(
                f"dialogue {request.dialogue_id}, turn {request.turn_index}: asked before with other content; "
                "a retry must repeat the request, and another dialogue needs another id"
            )
        self._window.requests += 1
        self._window.retries += known is not None
        self._seen[key] = digest
        self._seen.move_to_end(key)
        while len(self._seen) > self._max_remembered:
            self._seen.popitem(last=False)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            self._window.batch_sizes.append(len(batch))
            await loop.run_in_executor(self._worker, self._answer, loop, batch)

    def _answer(self, loop: asyncio.AbstractEventLoop, batch: list[_Pending]) -> None:
        """In the worker thread: answer one by one; an error belongs to its own request."""
        for pending in batch:
            outcome: UserResponse | Exception
            try:
                outcome = self._simulator.respond(pending.request)
            except Exception as error:
                outcome = error
            loop.call_soon_threadsafe(self._deliver, pending, outcome)

    def _deliver(self, pending: _Pending, outcome: UserResponse | Exception) -> None:
        # The caller may have given up waiting.
        if pending.future.done():
            return
        if isinstance(outcome, Exception):
            self._window.failures += 1
            pending.future.set_exception(outcome)
            return
        self._window.latencies_s.append(time.perf_counter() - pending.asked_at)
        pending.future.set_result(outcome)


def nearest_rank(ordered: list[float], quantile: float) -> float:
    """The `quantile` (0 to 1) of an ascending, non-empty list by the nearest-rank rule: always one of its values."""
    return ordered[max(math.ceil(quantile * len(ordered)), 1) - 1]
