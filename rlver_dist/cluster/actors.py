"""The plain classes, wrapped as Ray actors once, here; their names are what `ray list actors` and the dashboard show.

Every actor asks Ray for no cores of its own: engines, learners and services of a run take turns, and their threads are set by the
layout. Heavy packages are imported inside the actors, so that vLLM and DeepSpeed never meet in one process.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from torch import Tensor

from rlver_dist.choices import Preset
from rlver_dist.config import RunConfig, SimulatorConfig
from rlver_dist.experience.samples import TurnSample
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.tracking.metrics import Metric
from rlver_dist.training_config import WarmUpConfig

MAX_CONCURRENCY = 4096
"""Calls that wait inside one engine or service actor; Ray's own limit of 1,000 would stall a large batch unseen."""


class RewardServiceActor:
    """One replica of the reward service: simulated users under the run's rules (`train`) and under SAGE's (`evaluation`)."""

    def __init__(self, simulator: SimulatorConfig) -> None:
        from rlver_dist.simulator.appraisal import EmbeddedAppraiser
        from rlver_dist.simulator.embedded import EmbeddedSimulator
        from rlver_dist.simulator.presets import resolve_rules
        from rlver_dist.simulator.service import RewardService

        appraiser = EmbeddedAppraiser()
        configs = {"train": simulator, "evaluation": SimulatorConfig(preset=Preset.sage)}
        self._suites = {
            name: RewardService(EmbeddedSimulator(rules=resolve_rules(config), appraiser=appraiser)) for name, config in configs.items()
        }

    async def respond(self, suite: str, request: UserRequest) -> UserResponse:
        """Appraise the last reply and answer it, or open the dialogue."""
        return await self._suites[suite].respond(request)

    async def metrics(self) -> dict[str, float]:
        """Latency, queue depth and batch size of the training users since the last call."""
        return self._suites["train"].metrics()


class LearnerActor:
    """One rank of a learner. Built in two steps, because rank 0's node and port are known only once it runs."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: str, threads: int) -> None:
        self._config, self._rank = config, rank
        self._place: dict[str, Any] = {"rank": rank, "world_size": world_size, "device": device, "num_threads": threads}
        self._learner: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def save(self, directory: str) -> None:
        """Write the training state."""
        self._started.save(directory)

    def load(self, directory: str) -> None:
        """Go on from a training state."""
        self._started.load(directory)

    def close(self) -> None:
        """Leave the process group."""
        if self._learner is not None:
            self._learner.close()

    @property
    def _started(self) -> Any:
        assert self._learner is not None, "start() comes first"
        return self._learner


class CriticLearnerActor(LearnerActor):
    """One rank of the critic."""

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group and load the model."""
        from rlver_dist.learner.critic import CriticLearner

        self._learner = CriticLearner(config=self._config, master_address=master_address, master_port=master_port, **self._place)

    def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """`CriticLearner.values`."""
        return self._started.values(samples)

    def update(self, samples: list[TurnSample], values: list[Tensor], returns: list[Tensor]) -> list[Metric]:
        """`CriticLearner.update`."""
        return self._started.update(samples, values, returns)


class PolicyLearnerActor(LearnerActor):
    """One rank of the policy learner."""

    _sender: Any = None

    def start(self, master_address: str, master_port: int, model_path: str | None) -> None:
        """Join the process group and load the model: the configured one, or what a warm-up made of it."""
        from rlver_dist.learner.policy import PolicyLearner

        self._learner = PolicyLearner(
            config=self._config, master_address=master_address, master_port=master_port, model_path=model_path, **self._place
        )

    def update(self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float) -> list[Metric]:
        """`PolicyLearner.update`."""
        return self._started.update(samples, advantages, kl_coef)

    def imitate(self, samples: list[TurnSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """`PolicyLearner.imitate`."""
        return self._started.imitate(samples, config, seed)

    def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """`PolicyLearner.kl_tokens`."""
        return self._started.kl_tokens(samples)

    def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """`PolicyLearner.base_nll`."""
        return self._started.base_nll(samples)

    def probe(self, token_ids: list[int]) -> list[float]:
        """`PolicyLearner.probe`."""
        return self._started.probe(token_ids)

    def write_weights(self, path: str) -> None:
        """`PolicyLearner.write_weights`."""
        self._started.write_weights(path)

    def connect_engines(self, engines: list[ActorHandle], workers_per_engine: int, address: str, port: int) -> None:
        """The learner's half of the NCCL transfer group; rank 0 calls the engines. GPUs only."""
        # The one place where vLLM enters a DeepSpeed process: vLLM's NCCL sender has no other home. Nothing of it is served here.
        from rlver_dist.rollout.weight_transfer import EngineCalls, LearnerWeights, nccl_sender

        def all_engines(method: str, *arguments: Any) -> None:
            ray.get([getattr(engine, method).remote(*arguments) for engine in engines])

        def connect(init_infos: list[dict[str, Any]]) -> None:
            ray.get([engine.connect.remote(info) for engine, info in zip(engines, init_infos, strict=True)])

        self._calls = EngineCalls(
            workers_per_engine=(workers_per_engine,) * len(engines),
            connect=connect,
            start=partial(all_engines, "start_update"),
            receive=partial(all_engines, "receive_update"),
            finish=partial(all_engines, "finish_update"),
        )
        source = LearnerWeights(self._started.metadata(), self._started.iter_full_tensors)
        self._sender = nccl_sender(rank=self._rank, master_address=address, master_port=port, calls=self._calls, source=source)

    def send_weights(self, version: int) -> None:
        """Broadcast all weights to the connected engines, labelled `version`."""
        self._calls.version = version
        self._sender.send_weights()

    def export(self, directory: str) -> None:
        """`PolicyLearner.export`."""
        self._started.export(directory)
