"""All ranks of a learner, addressed as one; what `components.py`'s `Policy` and `Critic` ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from torch import Tensor

from rlver_dist.cluster.actors import PROGRESS_THREAD
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.tracking.metrics import Metric


class LearnerGroup:
    """Every call goes to every rank, since each one is collective; where all answer alike, rank 0's answer
    counts."""

    def __init__(self, ranks: Sequence[ActorHandle]) -> None:
        self.ranks = list(ranks)

    async def start(self, *arguments: Any) -> None:
        """Let all ranks meet at rank 0 and load the model; `arguments` go to the ranks' `start`."""
        address, port = await self.ranks[0].rendezvous.remote()
        await self._all("start", address, port, *arguments)

    async def save(self, directory: Path) -> None:
        """Write the training state."""
        await self._all("save", str(directory.resolve()))

    async def load(self, directory: Path) -> None:
        """Read the training state."""
        await self._all("load", str(directory.resolve()))

    async def progress(self) -> tuple[int, int]:
        """What rank 0 has done of the call at hand, and all that it has to do."""
        return await self.ranks[0].progress.options(concurrency_group=PROGRESS_THREAD).remote()

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks))

    async def _metrics(self, method: str, *arguments: Any) -> list[Metric]:
        """The metrics of all ranks."""
        return [metric for metrics in await self._all(method, *arguments) for metric in metrics]


class CriticGroup(LearnerGroup):
    """The critic's ranks."""

    async def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Value before each trained token of each sample."""
        return (await self._all("values", ray.put(samples)))[0]

    async def update(
        self, samples: list[TurnSample], values: list[Tensor], returns: list[Tensor]
    ) -> list[Metric]:
        """Optimizer steps towards `returns`."""
        return await self._metrics("update", ray.put(samples), ray.put(values), ray.put(returns))


class PolicyGroup(LearnerGroup):
    """The policy learner's ranks."""

    async def update(
        self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float
    ) -> list[Metric]:
        """Optimizer steps."""
        return await self._metrics("update", ray.put(samples), ray.put(advantages), kl_coef)

    async def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up, after which training starts anew from the result."""
        return await self._metrics("imitate", ray.put(samples), config, seed)

    async def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """KL to the reference at each trained token of each sample, nats."""
        return (await self._all("kl_tokens", ray.put(samples)))[0]

    async def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all trained tokens under the base model, nats, and their number."""
        return (await self._all("base_nll", ray.put(samples)))[0]

    async def score_rate(self) -> float:
        """Tokens a second of a forward pass."""
        return (await self._all("score_rate"))[0]

    async def probe(self, token_ids: list[int]) -> list[float]:
        """Log-probs of a token sequence under the policy, nats."""
        return (await self._all("probe", token_ids))[0]

    async def weight_bytes(self) -> int:
        """Bytes of the file that `write_weights` writes."""
        return await self.ranks[0].weight_bytes.remote()

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

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face folder."""
        await self._all("export", str(directory.resolve()))
