"""The chat model that writes: the backends of the simulated users, opened in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rlver_dist.chat_client.http import HttpChat
from rlver_dist.chat_client.protocol import ChatAnswer, ChatBackend, ChatRequest
from rlver_dist.config.enums import Device, SimulatorBackend
from rlver_dist.config.machine import available_cores
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.rollout.chat_engine import ChatEngine
from rlver_dist.rollout.engine import EngineSettings


class EngineChat:
    """One vLLM engine as a `ChatBackend`. Several engines are better served by `vllm serve` and the backend
    `openai`."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The engine's answer; raises as `ChatBackend.ask` says."""
        return await self._engine.ask(request)

    def metrics(self) -> dict[str, float]:
        """None; each answer carries its own figures."""
        return {}

    async def close(self) -> None:
        """End vLLM's processes."""
        self._engine.close()


@asynccontextmanager
async def open_backend(config: SimulatorConfig, *, seed: int, concurrency: int) -> AsyncIterator[ChatBackend]:
    """The backend that `config` names, `vllm` or `openai`; closed on leaving.

    Raises:
        ConfigError: the environment lacks the backend's key, or the model's chat template knows no system
            messages.
        DataError: the model's folder is not there.
        BoundaryError: vLLM does not start.
    """
    backend: ChatBackend
    if config.backend is SimulatorBackend.openai:
        backend = HttpChat(config=config.openai)
    else:
        engine = ChatEngine(
            _engine_settings(config.engine, seed=seed, concurrency=concurrency), config.engine.model
        )
        await engine.start()
        backend = EngineChat(engine)
    try:
        yield backend
    finally:
        await backend.close()


def _engine_settings(engine: UserEngineConfig, *, seed: int, concurrency: int) -> EngineSettings:
    import torch

    device = Device.gpu if torch.cuda.is_available() else Device.cpu
    return EngineSettings.from_config(
        engine,
        engine,
        device=device,
        seed=seed,
        max_concurrent=concurrency,
        cpu_threads=available_cores(),
    )
