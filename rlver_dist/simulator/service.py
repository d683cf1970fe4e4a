"""The reward service: many dialogues ask at once, each gets its answer as soon as it is there, and the event
loop stays free.

A plain class; `cluster/` wraps it as an actor, and any number of replicas may run, because a simulated user
is a pure function of the request: a request that is asked again, here or at another replica, gets an equal
answer and moves no emotion a second time. So nothing has to be remembered but what metrics count.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from rlver_dist.latency import latency_metrics
from rlver_dist.simulator.protocol import AsyncUserSimulator, UserRequest, UserResponse, UserSimulator


@dataclass(kw_only=True, slots=True)
class _Window:
    """What happened since the metrics were last read.

    Attributes:
        seen: dialogue and turn of each request, to count those that are asked again.
        batches: times that the worker thread began to answer after it had nothing to do.
    """

    latencies_s: list[float] = field(default_factory=list)
    seen: set[tuple[str, int]] = field(default_factory=set)
    batches: int = 0
    queue_depth_max: int = 0
    requests: int = 0
    retries: int = 0
    failures: int = 0


class RewardService:
    """Stands in front of one simulator. All state belongs to the event loop's thread."""

    def __init__(self, simulator: UserSimulator | AsyncUserSimulator) -> None:
        self._window = _Window()
        self._waiting = 0
        self._simulator = simulator
        # A simulator that computes gets one thread, so that it needs no lock; requests wait for it in the
        # executor's queue. One that waits for others is awaited as often as is asked.
        self._thread: ThreadPoolExecutor | None = None
        if not inspect.iscoroutinefunction(simulator.respond):
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="simulator")

    async def respond(self, request: UserRequest) -> UserResponse:
        """The simulated user's answer. The same request asked again gets an equal answer, as far as the
        simulator is deterministic.

        Raises:
            Exception: whatever the simulator raises for this request; other requests are not affected.
        """
        self._count(request)
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
        if window.batches:
            values["batch_size_mean"] = window.requests / window.batches
        return {**values, **latency_metrics("latency", window.latencies_s)}

    def close(self) -> None:
        """Stop the worker thread after the request at hand; those still queued are cancelled."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _count(self, request: UserRequest) -> None:
        window = self._window
        window.batches += self._thread is not None and self._waiting == 0
        self._waiting += 1
        window.queue_depth_max = max(window.queue_depth_max, self._waiting)
        key = (request.dialogue_id, request.turn_index)
        window.requests += 1
        window.retries += key in window.seen
        window.seen.add(key)

    async def _answer(self, request: UserRequest) -> UserResponse:
        if self._thread is None:
            return await cast(AsyncUserSimulator, self._simulator).respond(request)
        compute = cast(UserSimulator, self._simulator).respond
        return await asyncio.get_running_loop().run_in_executor(self._thread, compute, request)
