"""All learner ranks, addressed as one; what `driver.Learner` asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from rlver_dist.experience.samples import TurnSample
from rlver_dist.tracking.metrics import Metric


class LearnerGroup:
    """Every call goes to every rank, since each one is collective; where all answer alike, rank 0's answer counts."""

    def __init__(self, ranks: Sequence[ActorHandle]) -> None:
        self.ranks = list(ranks)

    async def start(self) -> None:
        """Let all ranks meet at rank 0 and load the model."""
        address, port = await self.ranks[0].rendezvous.remote()
        await self._all("start", address, port)

    async def update(self, samples: list[TurnSample], advantages: list[float]) -> list[Metric]:
        """Optimizer steps; returns the metrics of all ranks."""
        per_rank = await self._all("update", ray.put(samples), advantages)
        return [metric for metrics in per_rank for metric in metrics]

    async def kl_sums(self, samples: list[TurnSample]) -> list[float]:
        """Summed KL to the reference of each sample, nats."""
        return (await self._all("kl_sums", ray.put(samples)))[0]

    async def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all sampled tokens under the base model, nats, and their number."""
        return (await self._all("base_nll", ray.put(samples)))[0]

    async def probe(self, token_ids: list[int]) -> list[float]:
        """Log-probs of a token sequence under the policy, nats."""
        return (await self._all("probe", token_ids))[0]

    async def write_weights(self, path: Path) -> None:
        """Write the policy's weights for the engines."""
        await self._all("write_weights", str(path))

    async def connect_engines(self, engines: list[ActorHandle], workers_per_engine: int) -> None:
        """Form the NCCL transfer group of rank 0 and all engine workers."""
        address, port = await self.ranks[0].rendezvous.remote()
        await self._all("connect_engines", engines, workers_per_engine, address, port)

    async def send_weights(self, version: int) -> None:
        """Broadcast the policy's weights to the connected engines."""
        await self._all("send_weights", version)

    async def save(self, directory: Path) -> None:
        """Write the training state."""
        await self._all("save", str(directory.resolve()))

    async def load(self, directory: Path) -> None:
        """Read the training state."""
        await self._all("load", str(directory.resolve()))

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face folder."""
        await self._all("export", str(directory.resolve()))

    async def close(self) -> None:
        """Leave the process group."""
        await self._all("close")

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks))
