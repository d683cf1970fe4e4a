"""Dialogues with LLM users whose endpoint fails at a given rate: how they end, and what that takes.

    python -m benchmarks.faults --dialogues 200 --rate 0.3

Everything but the chat model and the policy is real: sockets, `HttpChat`, `LlmSimulator`, the reward service
and the collector. The server's faults and its answers follow from the seed
(`tests/integration/faulty_server.py`).

Measured are attempts a call and complete dialogues of those begun. The reference is the same command with
`--rate 0`: one attempt a call, every dialogue complete.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice

from transformers import AutoTokenizer

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.chat_client.http import HttpChat
from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import HttpChatConfig, LlmUserConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Dialogue, EndReason
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, GenerateRequest, Generation, collect
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.service import RewardService
from tests.integration.faulty_server import FaultyServer, Hit

MAX_TURNS = 4
TIMEOUT_S = 1.0
LIMITS = CollectLimits(
    max_turns=MAX_TURNS,
    max_reply_tokens=64,
    max_context_tokens=100_000,
    end_on_truncation=False,
    strict_format=True,
    temperature=1.0,
    max_concurrent=16,
    request_timeout_s=30.0,
)


class Recorded:
    """A `ChatBackend` that keeps every answer that it hands on, by the call's key."""

    def __init__(self, backend: HttpChat) -> None:
        self._backend = backend
        self.answers: dict[str, list[ChatAnswer]] = {}

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """As the backend."""
        answer = await self._backend.ask(request)
        self.answers.setdefault(request.key, []).append(answer)
        return answer

    def metrics(self) -> dict[str, float]:
        """As the backend."""
        return self._backend.metrics()

    async def close(self) -> None:
        """As the backend."""
        await self._backend.close()


@dataclass(kw_only=True, slots=True)
class Outcome:
    """A finished run.

    Attributes:
        dialogues: all of them, sorted by id.
        hits: every request that reached the server.
        answers: every answer that reached the simulated users, by the call's key.
        calls: metrics of the HTTP backend.
        service: metrics of the reward service.
        users: metrics of the LLM users.
        seconds: of the whole run.
    """

    dialogues: list[Dialogue]
    hits: list[Hit]
    answers: dict[str, list[ChatAnswer]]
    calls: dict[str, float]
    service: dict[str, float]
    users: dict[str, float]
    seconds: float


async def hold_dialogues(*, dialogues: int, rate: float, seed: int) -> Outcome:
    """Hold so many dialogues while a share `rate` of the endpoint's responses is faulty."""
    renderer = Renderer(AutoTokenizer.from_pretrained(resolve(SMOLLM2)), "Be kind.")
    personas = islice(cycle(load_split("bank", "train")), dialogues)
    tasks = [
        DialogueTask(id=f"d{n:03d}", group_id=f"g{n // 8}", persona=persona, seed=seed + n)
        for n, persona in enumerate(personas)
    ]

    async def generate(request: GenerateRequest) -> Generation:
        token_ids = renderer.encode_reply("", f"I hear you. What happened after that? ({request.turn_index})")
        return Generation(
            token_ids=token_ids, logprobs=[-1.0] * len(token_ids), finish_reason="stop", policy_version=(0, 0)
        )

    async with FaultyServer(rate=rate, seed=seed) as server:
        config = HttpChatConfig(
            endpoints=server.url,
            model="stand-in",
            api_key_env="",
            timeout_s=TIMEOUT_S,
            max_retries=2,
            max_backoff_s=0.1,
        )
        backend = Recorded(HttpChat(config=config))
        users = LlmSimulator(rules=PRESETS[Preset.rlver_vanilla], backend=backend, settings=LlmUserConfig())
        service = RewardService(users)
        started = time.perf_counter()
        held = await collect(
            tasks, generate=generate, respond=service.respond, renderer=renderer, limits=LIMITS
        )
        seconds = time.perf_counter() - started
        await backend.close()
        service.close()
    return Outcome(
        dialogues=held,
        hits=server.hits,
        answers=backend.answers,
        calls=backend.metrics(),
        service=service.metrics(),
        users=users.metrics(),
        seconds=seconds,
    )


def table(outcome: Outcome) -> str:
    """Faults sent, what calls made of them, and how dialogues ended, as text."""
    calls = outcome.calls
    rows: list[tuple[str, float]] = [("responses", len(outcome.hits))]
    faults = Counter(hit.kind.value for hit in outcome.hits if hit.kind is not None)
    rows += [(f"  faulty: {kind}", count) for kind, count in sorted(faults.items())]
    rows += [
        ("calls", calls["calls"]),
        ("  retries", calls["retries"]),
        ("  failed for good", calls["failures"]),
    ]
    rows += [("  answers outside their schema, asked again", outcome.users["schema_retries"])]
    rows += [(f"  latency {name}, s", round(calls[f"latency_{name}_s"], 3)) for name in ("p50", "p95", "p99")]
    rows += [(f"  {kind} tokens", calls[f"{kind}_tokens"]) for kind in ("prompt", "cached", "completion")]
    rows += [("dialogues", len(outcome.dialogues))]
    ends = Counter(dialogue.end_reason.value for dialogue in outcome.dialogues)
    rows += [(f"  {reason}", count) for reason, count in sorted(ends.items())]
    reasons = Counter(
        failure_kind(dialogue)
        for dialogue in outcome.dialogues
        if dialogue.end_reason is EndReason.INFRASTRUCTURE
    )
    rows += [(f"    failed by: {reason}", count) for reason, count in sorted(reasons.items())]
    rows += [("seconds", round(outcome.seconds, 1))]
    return "\n".join(f"{name:<48}{value:>10g}" for name, value in rows)


def failure_kind(dialogue: Dialogue) -> str:
    """What a failed dialogue names as its reason: the last attempt's fault, or answers that kept breaking
    their schema."""
    found = re.search(r"last: \S+ (\w+):|(broke their schema)", dialogue.error or "")
    return (found[1] or found[2]) if found else "unknown"


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Dialogues over an endpoint that fails.")
    parser.add_argument("--dialogues", type=int, default=200, help="how many")
    parser.add_argument("--rate", type=float, default=0.3, help="share of faulty responses, 0 to 1")
    parser.add_argument("--seed", type=int, default=7, help="of faults and answers")
    arguments = parser.parse_args()
    print(
        table(
            asyncio.run(
                hold_dialogues(dialogues=arguments.dialogues, rate=arguments.rate, seed=arguments.seed)
            )
        )
    )


if __name__ == "__main__":
    main()
