"""The evaluation stage: dialogues with held-out users, before and after training, and the controls."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import MAX_EMOTION, completed
from rlver_dist.evaluation.held_out import (
    HeldOut,
    evaluation_tasks,
    second_emotions,
    summarize,
    visible_samples,
)
from rlver_dist.evaluation.second_judge import judge_names
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.trainer.components import KeepFn, Parts, evaluation_limits, followed, kept_dialogues, rollout


async def evaluate(
    phase: Phase,
    *,
    config: RunConfig,
    parts: Parts,
    personas: Sequence[Persona],
    iteration: int,
    renderer: Renderer,
    kept: str | None = None,
    keep: KeepFn | None = None,
) -> HeldOut:
    """Hold one dialogue with each of `personas` under SAGE's rules and fixed seeds, write it to the ledger,
    and measure the controls.

    Replies are scored by what the user hears; a broken think format costs nothing here and is reported apart.

    Args:
        phase: which evaluation.
        config: of the run.
        parts: of the run.
        personas: whom to talk with.
        iteration: finished iterations.
        renderer: decides whether the policy thinks.
        kept: limits of the dialogues that an interrupted start has left in the ledger (`kept_dialogues`).
        keep: called as soon as the ledger has them.
    """
    started = time.monotonic()
    path = dialogues_path(Path(config.output_dir), phase=phase, iteration=iteration)
    tasks = evaluation_tasks(personas, phase=phase.value, seed=config.seed)
    limits = evaluation_limits(config, renderer.think)
    found = kept_dialogues(path, tasks, limits, kept)
    if found is not None:
        dialogues = found
    else:
        dialogues = await rollout(
            parts, f"evaluation {phase.value}", tasks, parts.evaluation_users, limits, renderer
        )
        scores = {dialogue.id: dialogue.final_emotion / MAX_EMOTION for dialogue in completed(dialogues)}
        write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
        if keep is not None:
            await keep(phase, repr(limits))
    samples = visible_samples(dialogues, parts.plain_renderer)
    nll, tokens = (
        await followed(parts, f"controls {phase.value}", parts.policy.base_nll(samples))
        if samples
        else (math.nan, 1)
    )
    judge = parts.second_judge
    second = await second_emotions(dialogues, personas, judge, parts.evaluation_rules) if judge else []
    results = summarize(
        dialogues,
        second_emotion=second,
        perplexity=math.exp(nll / max(tokens, 1)),
        judges=judge_names(config),
    )
    results.second_judge_counts = judge.metrics() if judge else {}
    if found is None:
        parts.forecast.evaluation_s = time.monotonic() - started
    return results
