"""All ranks of a learner, addressed as one; what `Policy` and `Critic` of `components.py` ask for.

Each call of the driver goes to every rank, since the learners' methods are collective.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from torch import Tensor

from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.learner.nccl import TransferTargets
from rlver_dist.tracking.metrics import Metric

PROGRESS_THREAD = "progress"
"""Name of the thread of a learner's actor that answers `progress` while another one computes."""


def find_rendezvous(_: object) -> tuple[str, int]:
    """This node's address and a free port there. Ray runs it in a rank's actor, and gives it the learner."""
    with socket.socket() as free:
        # The system chooses the port; in the moment until rank 0 listens there, nobody should ask for it.
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


class LearnerGroup:
    """All ranks of one learner. Where they all answer alike, rank 0's answer counts."""

    def __init__(self, ranks: Sequence[ActorHandle]) -> None:
        self.ranks = list(ranks)

    async def start(self) -> None:
        """Let all ranks meet at rank 0 and load the model."""
        await self._all("start", *await self._rendezvous())

    async def save(self, directory: Path) -> None:
        """Write the training state."""
        # Whole paths here and below: an actor on another node has another working directory.
        await self._all("save", str(directory.resolve()))

    async def load(self, directory: Path) -> None:
        """Read the training state."""
        await self._all("load", str(directory.resolve()))

    async def progress(self) -> tuple[int, int]:
        """What rank 0 has done of the call at hand, and all that it has to do."""
        # An actor answers one call at a time; this one has a thread of its own beside the one that computes.
        return await self.ranks[0].progress.options(concurrency_group=PROGRESS_THREAD).remote()

    async def _rendezvous(self) -> tuple[str, int]:
        """Rank 0's address and a free port there: where it runs is for Ray to choose, so it has to be
        asked."""
        rank: Any = self.ranks[0]
        return await rank.__ray_call__.remote(find_rendezvous)

    async def _all(self, method: str, *arguments: object) -> list[Any]:
        """Every rank's answer. Large arguments come as `ray.put` gives them, stored once for all ranks."""
        # gather raises the first rank's error at once: the others would wait for that rank in a collective.
        return await asyncio.gather(*(getattr(rank, method).remote(*arguments) for rank in self.ranks))

    async def _metrics(self, method: str, *arguments: object) -> list[Metric]:
        """The metrics of all ranks."""
        return [metric for metrics in await self._all(method, *arguments) for metric in metrics]


class CriticGroup(LearnerGroup):
    """The critic's ranks."""

    async def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Value before each trained token: `[n_i]` float32 for each sample, in reward."""
        return (await self._all("values", ray.put(samples)))[0]

    async def update(
        self, samples: list[TurnSample], values: list[Tensor], returns: list[Tensor]
    ) -> list[Metric]:
        """Optimizer steps towards `returns`, `[n_i]` for each sample; `values` are those that `values`
        gave."""
        return await self._metrics("update", ray.put(samples), ray.put(values), ray.put(returns))


class PolicyGroup(LearnerGroup):
    """The policy learner's ranks."""

    async def update(
        self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float
    ) -> list[Metric]:
        """Optimizer steps on one iteration's samples; `advantages` are `[n_i]` for each, `kl_coef` weighs the
        KL term."""
        return await self._metrics("update", ray.put(samples), ray.put(advantages), kl_coef)

    async def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up, after which training starts anew from the result."""
        return await self._metrics("imitate", ray.put(samples), config, seed)

    async def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """KL to the reference at each trained token: `[n_i]` float32 for each sample, nats."""
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

    async def connect_engines(self, engines: TransferTargets) -> None:
        """Form the NCCL transfer group of rank 0 and all engine workers."""
        await self._all("connect_engines", engines, *await self._rendezvous())

    async def send_weights(self, version: int) -> None:
        """Broadcast the policy's weights to the connected engines."""
        await self._all("send_weights", version)

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face folder."""
        await self._all("export", str(directory.resolve()))
