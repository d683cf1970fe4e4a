"""What the stages of a run share: limits of dialogues, sampling them and following a learner under a progress
bar, and what an earlier start has left in the ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rlver_dist.cluster.components import Components
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.dialogue import Dialogue, Turn, completed
from rlver_dist.errors import BoundaryError
from rlver_dist.ledger.parquet import read_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, RespondFn, collect
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.tracking.progress import Stage

FOLLOW_EVERY_S = 2.0
"""Seconds between two looks at how far a learner has come."""
Result = TypeVar("Result")
KeepFn = Callable[[Phase, str], Awaitable[None]]
"""Makes it last that the dialogues of a phase are complete in the ledger, and the limits (`repr`) that they
were held under."""


def train_limits(rollout: RolloutConfig, max_context_tokens: int) -> CollectLimits:
    """Limits of training dialogues: a broken think format ends them.

    Args:
        rollout: turns, tokens and temperature of training.
        max_context_tokens: of the policy's model.
    """
    return CollectLimits(
        max_turns=rollout.max_turns,
        max_reply_tokens=rollout.max_turn_tokens,
        max_context_tokens=max_context_tokens,
        end_on_truncation=rollout.end_on_truncation,
        strict_format=True,
        temperature=rollout.temperature,
        max_concurrent=rollout.max_concurrent,
        request_timeout_s=rollout.request_timeout_s,
    )


def evaluation_limits(
    rollout: RolloutConfig, evaluation: EvaluationConfig, max_context_tokens: int, *, think: bool
) -> CollectLimits:
    """Limits of evaluation dialogues: the reply's text is what counts, and the format is reported apart.

    Args:
        rollout: tokens of a reply.
        evaluation: turns and temperature.
        max_context_tokens: of the policy's model.
        think: the policy thinks first, and has the tokens for it.
    """
    return CollectLimits(
        max_turns=evaluation.max_turns,
        max_reply_tokens=rollout.max_turn_tokens if think else rollout.max_reply_tokens,
        max_context_tokens=max_context_tokens,
        end_on_truncation=rollout.end_on_truncation,
        strict_format=False,
        temperature=evaluation.temperature,
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
    # The ledger is sorted by id, like this.
    asked = sorted((task.id, task.persona.id, task.seed) for task in tasks)
    same = [(dialogue.id, dialogue.persona_id, dialogue.seed) for dialogue in dialogues] == asked
    return dialogues if same and len(completed(dialogues)) == len(tasks) else None


async def followed(
    components: Components, name: str, work: Awaitable[Result], unit: str = "tokens"
) -> Result:
    """Await `work`, in which the policy learner computes, under a progress bar called `name` that counts its
    `unit`s."""

    async def follow(stage: Stage) -> None:
        while True:
            await asyncio.sleep(FOLLOW_EVERY_S)
            # Whatever keeps a learner from answering is told by the work itself.
            with contextlib.suppress(Exception):
                done, total = await components.policy.progress()
                # Between two calls there is nothing to count, and the bar stays where it is.
                if total:
                    stage.reach(done, total)

    with components.console.phase(name, None, unit) as stage:
        following = asyncio.create_task(follow(stage))
        try:
            result = await work
        finally:
            following.cancel()
        # The last look was up to FOLLOW_EVERY_S ago.
        if stage.total is not None:
            stage.reach(stage.total, stage.total)
        return result


async def rollout(
    components: Components,
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
        components.forecast.sampling(),
        components.console.phase(name, len(tasks) * limits.max_turns, "turns") as stage,
    ):

        def progress(settled: int, turn: Turn | None) -> None:
            stage(settled)
            # A rollout with other users, such as one that asks for thoughts, is no dialogue of the run's
            # kind.
            if turn is not None and users in (components.users, components.evaluation_users):
                components.forecast.hear(turn)

        dialogues = await collect(
            tasks,
            generate=components.generate,
            respond=users,
            renderer=renderer,
            limits=limits,
            on_progress=progress,
        )
    if dialogues and not completed(dialogues):
        [(reason, count)] = Counter(dialogue.error for dialogue in dialogues).most_common(1)
        raise BoundaryError(f"{name}: all {len(dialogues)} dialogues failed, {count} of them with: {reason}")
    return dialogues
