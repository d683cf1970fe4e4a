"""What happens around the loop: the format warm-up before it, and evaluation with held-out users before and after it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rlver_dist.config import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.evaluation.held_out import HeldOut, evaluation_tasks, summarize, visible_samples
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.parts import Parts, evaluation_limits, hold, train_limits
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.warm_up import warm_up_samples

WARM_START = "warm_start"
"""Folder of the policy that the warm-up made, in a run's folder."""
WARM_UP_RESULTS = "warm_up.json"
"""Results of the policy before the warm-up, replying without thinking; written last, so it says that the stage is done."""


def warm_start(folder: Path) -> Path | None:
    """The policy that a finished warm-up of the run in `folder` made; None where there was none."""
    return folder / WARM_START if (folder / WARM_UP_RESULTS).exists() else None


def control_results(folder: Path) -> HeldOut | None:
    """What the policy scored before the warm-up of the run in `folder`; None where it was not measured."""
    path = folder / WARM_UP_RESULTS
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return HeldOut(**kept) if kept else None


async def evaluate(
    phase: Phase, *, config: RunConfig, parts: Parts, personas: Sequence[Persona], iteration: int, renderer: Renderer
) -> HeldOut:
    """Hold one dialogue with each of `personas` under SAGE's rules and fixed seeds, and write it to the ledger.

    Replies are scored by what the user hears; a broken think format costs nothing here and is reported apart.
    """
    tasks = evaluation_tasks(personas, phase=phase.value, seed=config.seed)
    dialogues = await hold(parts, f"evaluation {phase.value}", tasks, parts.evaluation_users, evaluation_limits(config), renderer)
    with parts.console.phase(f"controls {phase.value}", 1) as advance:
        samples = visible_samples(dialogues, parts.plain_renderer)
        nll, tokens = await parts.policy.base_nll(samples) if samples else (math.nan, 1)
        results = summarize(dialogues, personas, parts.second_appraiser, parts.evaluation_rules, math.exp(nll / max(tokens, 1)))
        advance(1)
    path = dialogues_path(Path(config.output_dir), phase=phase, iteration=iteration)
    scores = {dialogue.id: dialogue.final_emotion / 100 for dialogue in dialogues}
    write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
    return results


async def warm_up(*, config: RunConfig, parts: Parts, train: Sequence[Persona], evaluation: Sequence[Persona]) -> None:
    """Measure the policy as it came, teach it the think format, export the result and bring the engines to it."""
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
    values = {metric.key: metric.value for metric in metrics}
    parts.console.note(
        f"warm-up: {len(samples)} replies, loss {values['warm_up/loss_first']:.2f} -> {values['warm_up/loss_last']:.2f} nats a token"
    )
    output = Path(config.output_dir)
    await parts.policy.export(output / WARM_START)
    aside = output / f"{WARM_UP_RESULTS}.tmp"
    aside.write_text(json.dumps(asdict(control) if control else None), encoding="utf-8")
    os.replace(aside, output / WARM_UP_RESULTS)
    await parts.sync(0)
