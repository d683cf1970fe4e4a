"""What a user's turn costs in one call and in two (`simulator.llm.calls`), on an own vLLM engine.

    python -m benchmarks.user_calls --model smollm2-135m-instruct --users 16 --repeats 3

So many users of the evaluation bank answer the first reply of a dialogue at the same time, in both modes by
turns, after one round that fills the prefix cache and compiles the schemas. Prints a line of JSON a mode
(medians over the repeats) and the ratio of the seconds; the reference is two calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter

import torch

from rlver_dist.bundled_models import SMOLLM2
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.config.enums import Device, LlmCalls, Preset
from rlver_dist.config.simulator import LlmUserConfig, UserEngineConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Message, Role
from rlver_dist.errors import BoundaryError
from rlver_dist.rollout.chat_engine import ChatEngine
from rlver_dist.rollout.engine import EngineSettings
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest

REPLY = "That sounds like a lot to carry on your own. What has been the hardest part of it for you?"
EMOTION = 50.0
"""Far from both ends, so that every turn has an answer."""


class Counting:
    """A `ChatBackend` that counts what passes through it."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self.counts: Counter[str] = Counter()

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """`ChatEngine.ask`."""
        answer = await self._engine.ask(request)
        tokens = {
            name: getattr(answer, name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
        }
        self.counts.update(calls=1, **tokens)
        return answer

    def metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        values = {name: float(count) for name, count in self.counts.items()}
        self.counts.clear()
        return values

    async def close(self) -> None:
        """Nothing of its own."""


async def round_of(
    backend: Counting, calls: LlmCalls, requests: list[UserRequest], limits: dict[str, int]
) -> dict[str, float]:
    """All users' turns at once: seconds, failed turns, calls and tokens."""
    user = LlmSimulator(
        rules=PRESETS[Preset.sage], backend=backend, settings=LlmUserConfig(calls=calls, **limits)
    )
    backend.metrics()
    started = time.perf_counter()
    answers = await asyncio.gather(*(user.respond(request) for request in requests), return_exceptions=True)
    seconds = time.perf_counter() - started
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, BoundaryError):
            raise answer
    return {
        "seconds": seconds,
        "failed": float(sum(isinstance(answer, BoundaryError) for answer in answers)),
        **backend.metrics(),
    }


async def measure(arguments: argparse.Namespace) -> None:
    """Both modes."""
    cuda = torch.cuda.is_available()
    config = UserEngineConfig(model=arguments.model, max_context_tokens=8192, kv_cache_gib=2)
    settings = EngineSettings.from_config(
        config,
        config,
        device=Device.gpu if cuda else Device.cpu,
        seed=0,
        max_concurrent=arguments.users,
        cpu_threads=torch.get_num_threads(),
    )
    engine = ChatEngine(settings, arguments.model)
    requests = [
        UserRequest(
            dialogue_id=persona.id,
            turn_index=0,
            persona=persona,
            emotion=EMOTION,
            seed=1,
            max_turns=8,
            messages=(
                Message(role=Role.USER, text=persona.opening),
                Message(role=Role.ASSISTANT, text=REPLY),
            ),
        )
        for persona in load_split("bank", "evaluation")[: arguments.users]
    ]
    limits = {
        "max_appraisal_tokens": arguments.appraisal_tokens,
        "max_message_tokens": arguments.message_tokens,
    }
    rounds: dict[LlmCalls, list[dict[str, float]]] = {calls: [] for calls in LlmCalls}
    await engine.start()
    try:
        backend = Counting(engine)
        for repeat in range(arguments.repeats + 1):
            for calls in LlmCalls:
                figures = await round_of(backend, calls, requests, limits)
                if repeat > 0:
                    rounds[calls].append(figures)
    finally:
        engine.close()
    medians = {
        calls: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for calls, found in rounds.items()
    }
    for calls, figures in medians.items():
        print(
            json.dumps(
                {"mode": calls.value, "turns": len(requests)}
                | {key: round(value, 2) for key, value in figures.items()}
            )
        )
    print(
        json.dumps(
            {
                "seconds of one call / two calls": round(
                    medians[LlmCalls.one]["seconds"] / medians[LlmCalls.two]["seconds"], 3
                )
            }
        )
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Measure users' turns in one call and in two.")
    parser.add_argument("--model", default=SMOLLM2, help="folder, hub id or bundled name")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--appraisal-tokens", type=int, default=160)
    parser.add_argument("--message-tokens", type=int, default=160)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
