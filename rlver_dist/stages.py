"""What happens around the loop: the format warm-up before it, and evaluation with held-out users before and after it."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from rlver_dist.checkpoints import WARM_START
from rlver_dist.config import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue, held
from rlver_dist.evaluation.held_out import HeldOut, evaluation_tasks, second_emotions, summarize, visible_samples
from rlver_dist.evaluation.second_judge import judge_names
from rlver_dist.experience.rewards import MAX_EMOTION
from rlver_dist.ledger.parquet import dialogues_path, read_dialogues, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.parts import Parts, evaluation_limits, followed, hold, train_limits
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.warm_up import warm_up_samples

Dialogues = list[Dialogue]
KeepFn = Callable[[Phase], Awaitable[None]]
"""Makes it last that the dialogues of a phase are complete in the ledger."""


async def evaluate(
    phase: Phase,
    *,
    config: RunConfig,
    parts: Parts,
    personas: Sequence[Persona],
    iteration: int,
    renderer: Renderer,
    kept: bool = False,
    keep: KeepFn | None = None,
) -> HeldOut:
    """Hold one dialogue with each of `personas` under SAGE's rules and fixed seeds, write it to the ledger, and measure the controls.

    Replies are scored by what the user hears; a broken think format costs nothing here and is reported apart.

    Args:
        phase: which evaluation.
        config: of the run.
        parts: of the run.
        personas: whom to talk with.
        iteration: finished iterations.
        renderer: decides whether the policy thinks.
        kept: the ledger has the dialogues already, of a start that was interrupted.
        keep: called as soon as it has them.
    """
    started = time.monotonic()
    path = dialogues_path(Path(config.output_dir), phase=phase, iteration=iteration)
    if kept:
        dialogues = read_dialogues(path)
    else:
        tasks = evaluation_tasks(personas, phase=phase.value, seed=config.seed)
        limits = evaluation_limits(config, renderer.think)
        dialogues = await hold(parts, f"evaluation {phase.value}", tasks, parts.evaluation_users, limits, renderer)
        scores = {dialogue.id: dialogue.final_emotion / MAX_EMOTION for dialogue in held(dialogues)}
        write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
        if keep is not None:
            await keep(phase)
    samples = visible_samples(dialogues, parts.plain_renderer)
    nll, tokens = await followed(parts, f"controls {phase.value}", parts.policy.base_nll(samples)) if samples else (math.nan, 1)
    judge = parts.second_judge
    second = await second_emotions(dialogues, personas, judge, parts.evaluation_rules) if judge else []
    results = summarize(dialogues, second_emotion=second, perplexity=math.exp(nll / max(tokens, 1)), judges=judge_names(config))
    results.second_judge_counts = judge.metrics() if judge else {}
    if not kept:
        parts.forecast.evaluation_s = time.monotonic() - started
    return results


async def warm_up(*, config: RunConfig, parts: Parts, train: Sequence[Persona], kept: bool, keep: KeepFn) -> None:
    """Teach the policy the think format, export the result and bring the engines to it.

    Args:
        config: of the run.
        parts: of the run.
        train: whom the replies to learn from are told to.
        kept: the ledger has these dialogues already, of a start that was interrupted.
        keep: called as soon as it has them.
    """
    path = dialogues_path(Path(config.output_dir), phase=Phase.warm_up, iteration=0)
    samples = await warm_up_samples(
        config=config,
        tokenizer=parts.tokenizer,
        personas=train,
        users=parts.users,
        limits=train_limits(config),
        hold=partial(hold, parts),
        known=read_dialogues(path) if kept else None,
        keep=partial(_keep_replies, path, keep),
    )
    imitating = parts.policy.imitate(samples, config.warm_up, config.seed)
    values = reduce_metrics(await followed(parts, "warm-up: imitation", imitating, "replies"))
    parts.console.note(
        f"warm-up: {len(samples)} replies, nats a token: format {values['warm_up/format_nll_first']:.2f} -> "
        f"{values['warm_up/format_nll_last']:.2f}, replies from the model as it came {values['warm_up/reply_kl_first']:.2f} -> "
        f"{values['warm_up/reply_kl_last']:.2f}"
    )
    await parts.policy.export(Path(config.output_dir) / WARM_START)
    await parts.sync(0)


async def _keep_replies(path: Path, keep: KeepFn, dialogues: Dialogues) -> None:
    write_dialogues(path, dialogues, iteration=0, phase=Phase.warm_up, rewards={})
    await keep(Phase.warm_up)
