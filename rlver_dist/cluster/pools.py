"""Actors of one kind, addressed as one: routing, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from rlver_dist.errors import BoundaryError
from rlver_dist.rollout.collector import GenerateRequest, Generation
from rlver_dist.simulator.protocol import UserRequest, UserResponse


class EnginePool:
    """The rollout engines. A new dialogue goes to the least loaded one and stays there, where its prefix is cached."""

    def __init__(self, engines: Sequence[ActorHandle]) -> None:
        self.engines = list(engines)
        self._load = [0] * len(self.engines)
        self._home: dict[str, int] = {}

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one reply on the dialogue's engine."""
        if request.turn_index == 0 or request.dialogue_id not in self._home:
            self._home[request.dialogue_id] = self._load.index(min(self._load))
        home = self._home[request.dialogue_id]
        self._load[home] += 1
        try:
            return await self.engines[home].generate.remote(request)
        finally:
            self._load[home] -= 1

    async def score(self, token_ids: list[int]) -> list[list[float]]:
        """Log-probs of one token sequence under each engine, nats."""
        return await asyncio.gather(*(engine.score.remote(token_ids) for engine in self.engines))

    async def stats(self) -> list[dict[str, int]]:
        """`PolicyEngine.stats` of each engine."""
        return await asyncio.gather(*(engine.stats.remote() for engine in self.engines))

    def forget_homes(self) -> None:
        """After a weight sync no prefix is cached anywhere: new turns may go anywhere."""
        self._home.clear()


class RewardPool:
    """The reward service's replicas. Any of them can answer any request, and the same request gets the same answer."""

    def __init__(self, replicas: Sequence[ActorHandle], suite: str) -> None:
        self._replicas = list(replicas)
        self._suite = suite
        self._load = [0] * len(self._replicas)
        self._dead: set[int] = set()

    async def respond(self, request: UserRequest) -> UserResponse:
        """Ask the least loaded replica, and another one if it has died.

        Raises:
            BoundaryError: every replica has died.
        """
        while len(self._dead) < len(self._replicas):
            index = min((i for i in range(len(self._replicas)) if i not in self._dead), key=self._load.__getitem__)
            self._load[index] += 1
            try:
                return await self._replicas[index].respond.remote(self._suite, request)
            except RayActorError:
                self._dead.add(index)
            finally:
                self._load[index] -= 1
        raise BoundaryError(f"reward service: all {len(self._replicas)} replicas have died")


async def gather_metrics(replicas: Sequence[ActorHandle]) -> list[dict[str, Any]]:
    """`metrics` since the last call, of each replica that lives."""
    answers: list[Any] = await asyncio.gather(*(replica.metrics.remote() for replica in replicas), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
            raise answer
    return [answer for answer in answers if isinstance(answer, dict)]
