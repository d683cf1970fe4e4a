"""What the driver drives: engines, users, learners and trackers as plain coroutines, whatever they run on.

Components:
    generate     samples replies with the policy's current weights
    users        appraise replies and answer them: `users` under the run's rules, `evaluation_users` under
        SAGE's
    policy       the policy learner: updates, scores with the frozen base model, saves, loads, exports
    critic       the critic learner, where the algorithm has one
    sync         carries the policy's weights to every engine
    trackers     take each iteration's metrics
    forecast     hears each reply, and says how long the run will take
    ranks        how many ranks each learner has, by its name, as checkpoints note it
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.dialogue import Dialogue, Turn, completed
from rlver_dist.errors import BoundaryError
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.ledger.parquet import read_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, GenerateFn, RespondFn, collect
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.emotion import EmotionRules
from rlver_dist.simulator.protocol import Judge
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.jsonl import Tracker
from rlver_dist.tracking.metrics import Metric
from rlver_dist.tracking.progress import Stage
from rlver_dist.trainer.forecast import Forecast

FOLLOW_EVERY_S = 2.0
"""Seconds between two looks at how far a learner has come."""
Result = TypeVar("Result")
KeepFn = Callable[[Phase, str], Awaitable[None]]
"""Makes it last that the dialogues of a phase are complete in the ledger, and the limits (`repr`) that they
were held under."""


class Policy(Protocol):
    """All ranks of the policy learner, addressed as one. Columns hold one `[n]` tensor a sample, over its
    trained tokens."""

    async def update(
        self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float
    ) -> list[Metric]:
        """Optimizer steps on one iteration's samples."""

    async def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up; training starts anew from the result."""

    async def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """KL to the reference at each trained token, nats."""

    async def score_rate(self) -> float:
        """Tokens a second of a forward pass, measured now."""

    async def progress(self) -> tuple[int, int]:
        """What the call at hand has computed, and all that it will: tokens, replies of `imitate`; 0 and 0
        where there is none."""

    async def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all trained tokens under the base model at temperature 1 in nats, and
        their number."""

    async def save(self, directory: Path) -> None:
        """Write everything that training needs to go on."""

    async def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""

    async def export(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder."""


class Critic(Protocol):
    """All ranks of the critic learner, addressed as one."""

    async def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Expected reward before each trained token."""

    async def update(
        self, samples: list[TurnSample], values: list[Tensor], returns: list[Tensor]
    ) -> list[Metric]:
        """Optimizer steps towards `returns`; `values` are those that `values` gave."""

    async def save(self, directory: Path) -> None:
        """Write everything that training needs to go on."""

    async def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""


@dataclass(kw_only=True, slots=True)
class Parts:
    """See the module's docstring; `renderer` is the run's own, `plain_renderer` never asks for thinking, both
    for `tokenizer`."""

    generate: GenerateFn
    users: RespondFn
    evaluation_users: RespondFn
    second_judge: Judge | None
    evaluation_rules: EmotionRules
    policy: Policy
    critic: Critic | None
    sync: Callable[[int], Awaitable[list[Metric]]]
    service_metrics: Callable[[], Awaitable[list[Metric]]]
    tokenizer: Any
    renderer: Renderer
    plain_renderer: Renderer
    trackers: Sequence[Tracker]
    console: Console
    forecast: Forecast
    ranks: dict[str, str]


def train_limits(config: RunConfig) -> CollectLimits:
    """Limits of training dialogues: a broken think format ends them."""
    rollout = config.rollout
    return _limits(
        config, rollout.max_turns, rollout.max_turn_tokens, rollout.temperature, strict_format=True
    )


def evaluation_limits(config: RunConfig, think: bool) -> CollectLimits:
    """Limits of evaluation dialogues: the reply's text is what counts, and the format is reported apart."""
    tokens = config.rollout.max_turn_tokens if think else config.rollout.max_reply_tokens
    return _limits(
        config, config.evaluation.max_turns, tokens, config.evaluation.temperature, strict_format=False
    )


def _limits(
    config: RunConfig, max_turns: int, max_tokens: int, temperature: float, *, strict_format: bool
) -> CollectLimits:
    rollout = config.rollout
    return CollectLimits(
        max_turns=max_turns,
        max_reply_tokens=max_tokens,
        max_context_tokens=config.model.max_context_tokens,
        end_on_truncation=rollout.end_on_truncation,
        strict_format=strict_format,
        temperature=temperature,
        max_concurrent=rollout.max_concurrent,
        request_timeout_s=rollout.request_timeout_s,
    )


def kept_dialogues(
    path: Path, tasks: Sequence[DialogueTask], limits: CollectLimits, kept: str | None
) -> list[Dialogue] | None:
    """Dialogues that an interrupted start has left in the ledger.

    Args:
        path: the ledger's file.
        tasks: what is to be held now.
        limits: under which.
        kept: the limits (`repr`) that the file's dialogues were held under; None where there is none to go on
            with.

    Returns:
        None where they have to be held anew: others are asked for, or infrastructure failed in one of them.
    """
    if kept != repr(limits) or not path.exists():
        return None
    dialogues = read_dialogues(path)
    asked = sorted((task.id, task.persona.id, task.seed) for task in tasks)
    same = [(dialogue.id, dialogue.persona_id, dialogue.seed) for dialogue in dialogues] == asked
    return dialogues if same and len(completed(dialogues)) == len(tasks) else None


async def followed(
    parts: Parts, name: str, work: Coroutine[Any, Any, Result], unit: str = "tokens"
) -> Result:
    """Await `work`, in which the policy learner computes, under a progress bar called `name` that counts its
    `unit`s."""

    async def follow(stage: Stage) -> None:
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            # Whatever keeps a learner from answering is told by the work itself.
            with contextlib.suppress(Exception):
                done, total = await parts.policy.progress()
                if total:
                    stage.reach(done, total)

    with parts.console.phase(name, None, unit) as stage:
        following = asyncio.create_task(follow(stage))
        try:
            result = await work
        finally:
            following.cancel()
        if stage.total is not None:
            stage.reach(stage.total, stage.total)
        return result


async def rollout(
    parts: Parts,
    name: str,
    tasks: Sequence[DialogueTask],
    users: RespondFn,
    limits: CollectLimits,
    renderer: Renderer,
) -> list[Dialogue]:
    """Hold all dialogues of `tasks` under a progress bar called `name`; sorted by id.

    Raises:
        BoundaryError: infrastructure ended every one of them, and would end those to come.
    """
    with (
        parts.forecast.sampling(),
        parts.console.phase(name, len(tasks) * limits.max_turns, "turns") as stage,
    ):

        def progress(settled: int, turn: Turn | None) -> None:
            stage(settled)
            # A rollout with other users, such as one that asks for thoughts, is no dialogue of the run's
            # kind.
            if turn is not None and users in (parts.users, parts.evaluation_users):
                parts.forecast.hear(turn)

        dialogues = await collect(
            tasks,
            generate=parts.generate,
            respond=users,
            renderer=renderer,
            limits=limits,
            on_progress=progress,
        )
    if dialogues and not completed(dialogues):
        [(reason, count)] = Counter(dialogue.error for dialogue in dialogues).most_common(1)
        raise BoundaryError(f"{name}: all {len(dialogues)} dialogues failed, {count} of them with: {reason}")
    return dialogues
