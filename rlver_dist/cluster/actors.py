"""The reward service as an actor: the simulated users of a run, whatever speaks for them.

The other actors are plain classes of `rollout/` and `learner/`, which `place.py` wraps as this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ray.actor import ActorHandle

from rlver_dist.chat_client.protocol import ChatBackend
from rlver_dist.cluster.pools import ChatPool
from rlver_dist.config.enums import SimulatorBackend
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.simulator.protocol import UserRequest, UserResponse
from rlver_dist.simulator.service import RewardService

if TYPE_CHECKING:
    from rlver_dist.simulator.llm.user import LlmSimulator
    from rlver_dist.simulator.rules.user import EmbeddedSimulator


def _embedded_users(configs: Mapping[str, SimulatorConfig]) -> dict[str, EmbeddedSimulator]:
    # Imported in the actor, not by the driver, which makes it and appraises nothing.
    from rlver_dist.simulator.presets import resolve_rules
    from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
    from rlver_dist.simulator.rules.user import EmbeddedSimulator

    # Both suites share the sentence embeddings and their cache; the rules alone differ.
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
        self._simulator = simulator
        self._engines = engines
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
        # The chat model speaks for both suites, so its calls are counted together.
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
