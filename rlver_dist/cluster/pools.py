"""Actors of one kind, addressed as one: routing, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from rlver_dist.chat_client.metrics import ChatWindow
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.cluster.routing import HomeRouter, Router
from rlver_dist.errors import BoundaryError, GoneError, RlverError
from rlver_dist.rollout.collector import GenerateRequest, Generation
from rlver_dist.simulator.protocol import UserRequest, UserResponse

UNAVAILABLE_WAIT_S = 1.0
"""Wait before a member that the network has lost for a moment is asked again."""


class EnginePool:
    """The rollout engines. A new dialogue goes to the least loaded one and stays there, where its prefix is
    cached, until the engine dies."""

    def __init__(self, engines: Sequence[ActorHandle]) -> None:
        self.engines = list(engines)
        self._router = HomeRouter(len(self.engines))

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one reply on the dialogue's engine, or on another one if that has died: all hold the same
        weights.

        Raises:
            BoundaryError: the engine failed for this request, or every engine has died.
        """
        reply, _ = await _ask_any(
            self.engines, self._router, request.dialogue_id, "rollout engine", "generate", request
        )
        return reply

    async def score(self, token_ids: list[int]) -> list[list[float]]:
        """Log-probs of one token sequence under each engine, nats."""
        return await asyncio.gather(*(engine.score.remote(token_ids) for engine in self.engines))

    async def stats(self) -> list[dict[str, int]]:
        """Of each engine: requests that are not finished, and tokens of prompts, of cached prompts and of
        replies since its start."""
        return await asyncio.gather(*(engine.stats.remote() for engine in self.engines))

    def forget_homes(self) -> None:
        """After a weight sync no prefix is cached anywhere: new turns may go anywhere."""
        self._router.forget()


class RewardPool:
    """The reward service's replicas. Any of them can answer any request, and the same request gets the same
    answer."""

    def __init__(self, replicas: Sequence[ActorHandle], suite: str) -> None:
        self._replicas = list(replicas)
        self._suite = suite
        self._router = Router(len(self._replicas))

    async def respond(self, request: UserRequest) -> UserResponse:
        """Ask the persona's replica, or a less loaded one, and another one if it has died.

        Raises:
            BoundaryError: every replica has died.
            RlverError: what the replica raised on purpose.
        """
        what = "reward service replica"
        answer, _ = await _ask_any(
            self._replicas, self._router, request.persona.id, what, "respond", self._suite, request
        )
        return answer


class ChatPool:
    """A `ChatBackend` over the users' engines: equal affinities meet on one engine, where their prefix is
    cached."""

    def __init__(self, engines: Sequence[ActorHandle]) -> None:
        self._engines = list(engines)
        self._router = Router(len(self._engines))
        self._window = ChatWindow()

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """Ask the affinity's engine, or a less loaded one, and another one if it has died.

        Raises:
            BoundaryError: the engine failed for this request, or every engine has died.
        """
        started = time.perf_counter()
        try:
            answer, died = await _ask_any(
                self._engines, self._router, request.affinity, "user engine", "ask", request
            )
        except RlverError:
            self._window.fail()
            raise
        except asyncio.CancelledError:
            self._window.cancel()
            raise
        answer = replace(answer, seconds=time.perf_counter() - started, retries=died)
        self._window.add(answer)
        return answer

    def metrics(self) -> dict[str, float]:
        """Calls, tokens and latencies since the last call, and the engines that have died so far."""
        window = self._window
        self._window = ChatWindow()
        return window.values() | {"engines_lost_max": float(len(self._router.dead))}

    async def close(self) -> None:
        """The engines belong to the run, which ends them."""


async def _ask_any(
    members: Sequence[ActorHandle], router: Router, affinity: str, what: str, method: str, *arguments: object
) -> tuple[Any, int]:
    """Call `method` of one member, and of another one each time that one has died. Returns the answer and the
    number that died.

    Cancelled, it takes the call along.

    Raises:
        BoundaryError: every member has died, or the call failed by accident.
        RlverError: what the member raised on purpose.
    """
    died = 0
    while (index := router.pick(affinity)) is not None:
        with router.call(index):
            call = getattr(members[index], method).remote(*arguments)
            try:
                return await call, died
            except asyncio.CancelledError:
                # Whoever asked is gone: spare the member the work.
                ray.cancel(call)
                raise
            except ActorUnavailableError:
                # Before RayActorError, which it is a kind of. The network has lost the actor, which may come
                # back; the caller's deadline bounds the wait.
                await asyncio.sleep(UNAVAILABLE_WAIT_S)
            except RayActorError:
                # The actor's process is gone; requests are pure, so another member may simply be asked.
                router.dead.add(index)
                died += 1
            except RayTaskError as error:
                if isinstance(error.cause, GoneError):
                    # The actor lives, but vLLM's process below it is gone.
                    router.dead.add(index)
                    died += 1
                    continue
                if isinstance(error.cause, RlverError):
                    raise error.cause from None
                raise BoundaryError(f"{what}: {type(error.cause).__name__}: {error.cause}") from error
    raise BoundaryError(f"all {len(members)} {what}s have died")


async def gather_metrics(replicas: Sequence[ActorHandle]) -> list[dict[str, float]]:
    """Metrics since the last call, of each replica that lives."""
    answers: list[dict[str, float] | BaseException] = await asyncio.gather(
        *(replica.metrics.remote() for replica in replicas), return_exceptions=True
    )
    # A dead replica's numbers are lost with it; that it is dead the pool notices by itself.
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
            raise answer
    return [answer for answer in answers if isinstance(answer, dict)]
