"""The evaluation stage: dialogues with held-out users, before and after training, and the controls."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rlver_dist.cluster.components import Components
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import MAX_EMOTION, Dialogue, completed
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
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.trainer.stages import KeepFn, evaluation_limits, followed, kept_dialogues, rollout


class EvaluationStage:
    """Holds one dialogue with each held-out persona and says what they are worth."""

    def __init__(
        self,
        components: Components,
        personas: Sequence[Persona],
        *,
        evaluation: EvaluationConfig,
        rollout: RolloutConfig,
        simulator: SimulatorConfig,
        max_context_tokens: int,
        seed: int,
        output: Path,
    ) -> None:
        """
        Args:
            components: of the run.
            personas: whom to talk with; none switches evaluation off.
            evaluation: turns and temperature, and who judges a second time.
            rollout: tokens of a reply.
            simulator: who speaks for the users; evaluation takes SAGE's rules whatever it says of rules.
            max_context_tokens: of the policy's model.
            seed: of the run.
            output: the run's folder.
        """
        self._components = components
        self._personas = personas
        self._evaluation = evaluation
        self._rollout = rollout
        self._rules = resolve_rules(simulator.for_evaluation()).emotion
        self._judges = judge_names(simulator, evaluation)
        self._max_context_tokens = max_context_tokens
        self._seed = seed
        self._output = output

    @property
    def num_dialogues(self) -> int:
        """Dialogues of one evaluation; 0 where evaluation is off."""
        return len(self._personas)

    async def run(
        self, phase: Phase, *, iteration: int, kept: str | None = None, keep: KeepFn | None = None
    ) -> HeldOut:
        """Hold the dialogues under SAGE's rules and fixed seeds, write them to the ledger, and measure the
        controls.

        Replies are scored by what the user hears; a broken think format costs nothing here and is reported
        apart. The control's policy is never asked to think, since it was not taught to.

        Args:
            phase: which evaluation.
            iteration: finished iterations.
            kept: limits of the dialogues that an interrupted start has left in the ledger
                (`kept_dialogues`).
            keep: called as soon as the ledger has them.
        """
        started = time.monotonic()
        components = self._components
        renderer = components.plain_renderer if phase is Phase.control else components.renderer
        path = dialogues_path(self._output, phase=phase, iteration=iteration)
        tasks = evaluation_tasks(self._personas, phase=phase.value, seed=self._seed)
        limits = evaluation_limits(
            self._rollout, self._evaluation, self._max_context_tokens, think=renderer.think
        )
        dialogues = kept_dialogues(path, tasks, limits, kept)
        if dialogues is not None:
            return await self._measure(phase, dialogues)
        dialogues = await rollout(
            components, f"evaluation {phase.value}", tasks, components.evaluation_users, limits, renderer
        )
        # Held-out dialogues are scored as a user feels: no rule for ends, no guard.
        scores = {dialogue.id: dialogue.final_emotion / MAX_EMOTION for dialogue in completed(dialogues)}
        write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
        if keep is not None:
            await keep(phase, repr(limits))
        results = await self._measure(phase, dialogues)
        # Dialogues from the ledger took no time, so an evaluation of such ones tells the forecast nothing.
        components.forecast.evaluation_s = time.monotonic() - started
        return results

    async def _measure(self, phase: Phase, dialogues: Sequence[Dialogue]) -> HeldOut:
        """What the dialogues are worth, and the controls of the language."""
        components = self._components
        # Without thinking also where the policy thinks, so that all evaluations compare.
        samples = visible_samples(dialogues, components.plain_renderer)
        perplexity = math.nan
        if samples:
            scoring = components.policy.base_nll(samples)
            nll, tokens = await followed(components, f"controls {phase.value}", scoring)
            # A policy that always stays silent leaves no tokens to score.
            perplexity = math.exp(nll / max(tokens, 1))
        judge = components.second_judge
        second = await second_emotions(dialogues, self._personas, judge, self._rules) if judge else []
        return summarize(
            dialogues,
            second_emotion=second,
            perplexity=perplexity,
            judges=self._judges,
            # Counts since the last call, so they belong to the dialogues just judged.
            second_judge_counts=judge.metrics() if judge else {},
        )
