"""What happens around the loop: the format warm-up before it, and evaluation with held-out users before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlver_dist.checkpoints import WARM_START
from rlver_dist.config import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import held
from rlver_dist.evaluation.held_out import HeldOut, evaluation_tasks, second_emotions, summarize, visible_samples
from rlver_dist.evaluation.second_judge import judge_names
from rlver_dist.experience.rewards import MAX_EMOTION
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.parts import Parts, evaluation_limits, hold, train_limits
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.warm_up import warm_up_samples


async def evaluate(
    phase: Phase, *, config: RunConfig, parts: Parts, personas: Sequence[Persona], iteration: int, renderer: Renderer
) -> HeldOut:
    """Hold one dialogue with each of `personas` under SAGE's rules and fixed seeds, and write it to the ledger.

    Replies are scored by what the user hears; a broken think format costs nothing here and is reported apart.
    """
    tasks = evaluation_tasks(personas, phase=phase.value, seed=config.seed)
    dialogues = await hold(
        parts, f"evaluation {phase.value}", tasks, parts.evaluation_users, evaluation_limits(config, renderer.think), renderer
    )
    with parts.console.phase(f"controls {phase.value}", 1) as advance:
        samples = visible_samples(dialogues, parts.plain_renderer)
        nll, tokens = await parts.policy.base_nll(samples) if samples else (math.nan, 1)
        perplexity = math.exp(nll / max(tokens, 1))
        judge, rules = parts.second_judge, parts.evaluation_rules
        second = await second_emotions(dialogues, personas, judge, rules) if judge else []
        results = summarize(dialogues, second_emotion=second, perplexity=perplexity, judges=judge_names(config))
        results.second_judge_counts = judge.metrics() if judge else {}
        advance(1)
    path = dialogues_path(Path(config.output_dir), phase=phase, iteration=iteration)
    scores = {dialogue.id: dialogue.final_emotion / MAX_EMOTION for dialogue in held(dialogues)}
    write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
    return results


async def warm_up(*, config: RunConfig, parts: Parts, train: Sequence[Persona], evaluation: Sequence[Persona]) -> HeldOut | None:
    """Measure the policy as it came, teach it the think format, export the result and bring the engines to it.

    Returns:
        The control: results before the warm-up, replying without thinking; None without evaluation personas.
    """
    control: HeldOut | None = None
    if evaluation:
        control = await evaluate(Phase.control, config=config, parts=parts, personas=evaluation, iteration=0, renderer=parts.plain_renderer)
    samples = await warm_up_samples(
        config=config,
        tokenizer=parts.tokenizer,
        personas=train,
        users=parts.users,
        limits=train_limits(config),
        hold=partial(hold, parts),
    )
    with parts.console.phase("warm-up: imitation", 1) as advance:
        metrics = await parts.policy.imitate(samples, config.warm_up, config.seed)
        advance(1)
    values = reduce_metrics(metrics)
    parts.console.note(
        f"warm-up: {len(samples)} replies, nats a token: format {values['warm_up/format_nll_first']:.2f} -> "
        f"{values['warm_up/format_nll_last']:.2f}, replies from the model as it came {values['warm_up/reply_kl_first']:.2f} -> "
        f"{values['warm_up/reply_kl_last']:.2f}"
    )
    await parts.policy.export(Path(config.output_dir) / WARM_START)
    await parts.sync(0)
    return control
