"""The plain classes, wrapped as Ray actors once, here; their names are what `ray list actors` and the dashboard show.

Every actor asks Ray for no cores of its own: engines, learners and services of a run take turns, and their threads are set by the
layout. Heavy packages are imported inside the actors, so that vLLM and DeepSpeed never meet in one process.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from rlver_dist.config import Preset, RunConfig, SimulatorConfig
from rlver_dist.experience.samples import TurnSample
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.tracking.metrics import Metric

if TYPE_CHECKING:
    from rlver_dist.learner.policy import PolicyLearner

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


class PolicyLearnerActor:
    """One learner rank. Built in two steps, because rank 0's node and port are known only once it runs."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: str, threads: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._device, self._threads = device, threads
        self._learner: PolicyLearner | None = None
        self._sender: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group and load the model."""
        from rlver_dist.learner.policy import PolicyLearner

        self._learner = PolicyLearner(
            config=self._config,
            rank=self._rank,
            world_size=self._world_size,
            master_address=master_address,
            master_port=master_port,
            device="cpu" if self._device == "cpu" else "gpu",
            num_threads=self._threads,
        )

    def update(self, samples: list[TurnSample], advantages: list[float]) -> list[Metric]:
        """`PolicyLearner.update`."""
        return self._started.update(samples, advantages)

    def kl_sums(self, samples: list[TurnSample]) -> list[float]:
        """`PolicyLearner.kl_sums`."""
        return self._started.kl_sums(samples)

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

    def save(self, directory: str) -> None:
        """`PolicyLearner.save`."""
        self._started.save(directory)

    def load(self, directory: str) -> None:
        """`PolicyLearner.load`."""
        self._started.load(directory)

    def export(self, directory: str) -> None:
        """`PolicyLearner.export`."""
        self._started.export(directory)

    def close(self) -> None:
        """Leave the process group."""
        if self._learner is not None:
            self._learner.close()

    @property
    def _started(self) -> PolicyLearner:
        assert self._learner is not None, "start() comes first"
        return self._learner
