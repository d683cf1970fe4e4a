"""The plain classes, wrapped as Ray actors once, here; their names are what `ray list actors` and the
dashboard show.

Every actor asks Ray for no cores of its own: engines, learners and services of a run take turns, and their
threads are set by the layout. Heavy packages are imported inside the actors, so that vLLM and DeepSpeed never
meet in one process.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from torch import Tensor

from rlver_dist.chat_client.protocol import ChatBackend
from rlver_dist.cluster.pools import ChatPool
from rlver_dist.config.enums import SimulatorBackend
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.simulator.service import RewardService
from rlver_dist.tracking.metrics import Metric

if TYPE_CHECKING:
    from rlver_dist.simulator.llm.user import LlmSimulator
    from rlver_dist.simulator.rules.user import EmbeddedSimulator

PROGRESS_THREAD = "progress"
"""Name of the thread of a learner's actor that answers `progress` while another one computes."""
MAX_CONCURRENCY = 4096
"""Calls that wait inside one engine or service actor; Ray's own limit of 1,000 would stall a large batch
unseen."""


def _embedded_users(configs: Mapping[str, SimulatorConfig]) -> dict[str, EmbeddedSimulator]:
    from rlver_dist.simulator.presets import resolve_rules
    from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
    from rlver_dist.simulator.rules.user import EmbeddedSimulator

    appraiser = EmbeddedAppraiser()
    return {
        name: EmbeddedSimulator(rules=resolve_rules(config), appraiser=appraiser)
        for name, config in configs.items()
    }


def _llm_users(
    backend: ChatBackend, judges: Sequence[ChatBackend], configs: Mapping[str, SimulatorConfig]
) -> dict[str, LlmSimulator]:
    from rlver_dist.simulator.llm.judges import llm_users
    from rlver_dist.simulator.presets import resolve_rules

    return {
        name: llm_users(rules=resolve_rules(config), backend=backend, config=config, judge_backends=judges)
        for name, config in configs.items()
    }


class RewardServiceActor:
    """One replica of the reward service: simulated users under the run's rules (`train`) and under SAGE's
    (`evaluation`)."""

    def __init__(self, simulator: SimulatorConfig, engines: Sequence[ActorHandle]) -> None:
        """`engines` are the users' own, `ChatEngine`s; empty where the backend needs none."""
        self._simulator, self._engines = simulator, engines
        self._backend: ChatBackend | None = None
        self._judges: list[ChatBackend] = []
        self._speakers: dict[str, LlmSimulator] = {}
        self._suites: dict[str, RewardService] = {}

    def start(self) -> None:
        """Load what speaks for the users.

        Raises:
            ConfigError: the environment lacks what the backend needs.
        """
        configs = {"train": self._simulator, "evaluation": self._simulator.for_evaluation()}
        self._backend = self._chat_backend()
        if self._backend is None:
            self._suites = {name: RewardService(user) for name, user in _embedded_users(configs).items()}
        else:
            self._judges = [self._http_chat(model) for model in self._simulator.further_judges]
            self._speakers = _llm_users(self._backend, self._judges, configs)
            self._suites = {name: RewardService(user) for name, user in self._speakers.items()}

    async def respond(self, suite: str, request: UserRequest) -> UserResponse:
        """Appraise the last reply and answer it, or open the dialogue."""
        return await self._suites[suite].respond(request)

    async def metrics(self) -> dict[str, float]:
        """Of the training users since the last call, as `chat_<name>` of the chat model, which speaks for all
        users, and as `judge_<i>_chat_<name>` of the models that only judge, i from 2 on."""
        values = self._suites["train"].metrics()
        if self._backend is None:
            return values
        chat = {f"chat_{name}": value for name, value in self._backend.metrics().items()}
        for number, judge in enumerate(self._judges, start=2):
            chat |= {f"judge_{number}_chat_{name}": value for name, value in judge.metrics().items()}
        return values | self._speakers["train"].metrics() | chat

    def _chat_backend(self) -> ChatBackend | None:
        simulator = self._simulator
        if simulator.backend is SimulatorBackend.vllm:
            return ChatPool(self._engines)
        if simulator.backend is SimulatorBackend.openai:
            return self._http_chat(simulator.openai.model)
        return None

    def _http_chat(self, model: str) -> ChatBackend:
        """`model` at the endpoints, with this replica's part of the limits that hold for all models
        together."""
        from rlver_dist.chat_client.http import HttpChat, divide_limits

        simulator = self._simulator
        models = len(simulator.further_judges) + (simulator.backend is SimulatorBackend.openai)
        config = divide_limits(simulator.openai, simulator.replicas * models)
        return HttpChat(config=replace(config, model=model))


class LearnerActor:
    """One rank of a learner. Built in two steps, because rank 0's node and port are known only once it
    runs."""

    def __init__(self, config: RunConfig, rank: int, world_size: int, device: str, threads: int) -> None:
        self._config, self._rank = config, rank
        self._place: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "device": device,
            "num_threads": threads,
        }
        self._learner: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def progress(self) -> tuple[int, int]:
        """`LearnerRank.progress`; asked in a thread of its own while another call runs."""
        return (0, 0) if self._learner is None else self._learner.progress()

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

        self._learner = CriticLearner(
            config=self._config, master_address=master_address, master_port=master_port, **self._place
        )

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
            config=self._config,
            master_address=master_address,
            master_port=master_port,
            model_path=model_path,
            **self._place,
        )

    def update(self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float) -> list[Metric]:
        """`PolicyLearner.update`."""
        return self._started.update(samples, advantages, kl_coef)

    def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """`PolicyLearner.imitate`."""
        return self._started.imitate(samples, config, seed)

    def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """`PolicyLearner.kl_tokens`."""
        return self._started.kl_tokens(samples)

    def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """`PolicyLearner.base_nll`."""
        return self._started.base_nll(samples)

    def score_rate(self) -> float:
        """`PolicyLearner.score_rate`."""
        return self._started.score_rate()

    def probe(self, token_ids: list[int]) -> list[float]:
        """`PolicyLearner.probe`."""
        return self._started.probe(token_ids)

    def weight_bytes(self) -> int:
        """Bytes of all weights, as `write_weights` writes them."""
        return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self._started.metadata())

    def write_weights(self, path: str) -> None:
        """`PolicyLearner.write_weights`."""
        self._started.write_weights(path)

    def connect_engines(
        self, engines: list[ActorHandle], workers_per_engine: int, address: str, port: int
    ) -> None:
        """The learner's half of the NCCL transfer group; rank 0 calls the engines. GPUs only."""
        # The one place where vLLM enters a DeepSpeed process: vLLM's NCCL sender has no other home. Nothing
        # of it is served here.
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
        self._sender = nccl_sender(
            rank=self._rank, master_address=address, master_port=port, calls=self._calls, source=source
        )

    def send_weights(self, version: int) -> None:
        """Broadcast all weights to the connected engines, labelled `version`."""
        self._calls.version = version
        self._sender.send_weights()

    def export(self, directory: str) -> None:
        """`PolicyLearner.export`."""
        self._started.export(directory)
