"""The loop.

Components, as the driver sees them (`Parts`):
    engines      sample replies with the policy's current weights and score token sequences
    users        appraise replies and answer them: `train` under the run's rules, `evaluation` under SAGE's
    learner      updates the policy, scores with the frozen base model, saves, loads, exports
    sync         carries the learner's weights to every engine
    trackers     take each iteration's metrics
Rules that bind them: one iteration is collect, update, sync, in that order, so every reply is sampled by the newest weights; a policy
version is the number of finished iterations; failed dialogues are data until `select_trainable` leaves them out, in one place; the
driver awaits plain coroutines and knows neither Ray nor vLLM nor DeepSpeed, so the same loop runs over any parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rlver_dist.checkpoints import CheckpointStore, Progress
from rlver_dist.config import KLPlacement, RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.dialogue import Dialogue, EndReason
from rlver_dist.evaluation.held_out import HeldOut, evaluation_tasks, summarize
from rlver_dist.experience.credit import assign_credit, samples_of
from rlver_dist.experience.rewards import dialogue_reward, select_trainable
from rlver_dist.experience.samples import TurnSample
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import CollectLimits, DialogueTask, GenerateFn, RespondFn, collect, derive_seed
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.appraisal import Appraiser
from rlver_dist.simulator.emotion import EmotionRules
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.dialogue_metrics import dialogue_metrics
from rlver_dist.tracking.jsonl import Tracker
from rlver_dist.tracking.metrics import Metric, Reduction, reduce_metrics


class Learner(Protocol):
    """All ranks of the policy learner, addressed as one."""

    async def update(self, samples: list[TurnSample], advantages: list[float]) -> list[Metric]:
        """Optimizer steps on one iteration's samples."""

    async def kl_sums(self, samples: list[TurnSample]) -> list[float]:
        """Summed KL to the reference of each sample, nats."""

    async def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all sampled tokens under the base model at temperature 1 in nats, and their number."""

    async def save(self, directory: Path) -> None:
        """Write everything that training needs to go on."""

    async def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""

    async def export(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder."""


@dataclass(kw_only=True, slots=True)
class Parts:
    """What the driver drives; see the module's docstring."""

    generate: GenerateFn
    users: RespondFn
    evaluation_users: RespondFn
    second_appraiser: Appraiser
    evaluation_rules: EmotionRules
    learner: Learner
    sync: Callable[[int], Awaitable[list[Metric]]]
    service_metrics: Callable[[], Awaitable[list[Metric]]]
    renderer: Renderer
    trackers: Sequence[Tracker]
    console: Console


class Driver:
    """Runs one configuration over its parts."""

    def __init__(self, config: RunConfig, parts: Parts, train: Sequence[Persona], evaluation: Sequence[Persona]) -> None:
        self._config = config
        self._parts = parts
        self._evaluation = list(evaluation[: config.evaluation.num_personas])
        self._sampler = PersonaSampler(train, config.seed)
        self._output = Path(config.output_dir)
        self._store = CheckpointStore(self._output, config.keep_checkpoints)
        self.progress = Progress(iteration=0, sampler=self._sampler.state(), totals={}, curve=[], before={})

    async def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: counters, sampler, results before training, learner."""
        self.progress = CheckpointStore.read(checkpoint)
        self._sampler.restore(self.progress.sampler)
        await self._parts.learner.load(checkpoint)
        self._parts.console.note(f"resumed from {checkpoint} after {self.progress.iteration} iterations")

    async def run(self) -> tuple[HeldOut | None, HeldOut | None]:
        """Evaluate, train, evaluate, export. Returns the results before and after; None where evaluation is off."""
        await self._parts.sync(self.progress.iteration)
        before = await self._before()
        for iteration in range(self.progress.iteration, self._config.num_iterations):
            await self._iterate(iteration)
        after = await self._evaluate(Phase.after) if self._evaluation else None
        with self._parts.console.phase("exporting policy", 1) as advance:
            await self._parts.learner.export(self._output / "policy")
            advance(1)
        return before, after

    async def _before(self) -> HeldOut | None:
        if not self._evaluation:
            return None
        if not self.progress.before:
            self.progress.before = asdict(await self._evaluate(Phase.before))
        return HeldOut(**self.progress.before)

    async def _iterate(self, iteration: int) -> None:
        clock = _Clock()
        tasks = self._tasks(iteration)
        limits = self._limits(self._config.rollout.max_turns, self._config.rollout.temperature)
        dialogues = await self._collect(f"iteration {iteration + 1}: rollout", tasks, self._parts.users, limits)
        clock.lap("rollout")
        rewards, advantages, metrics = await self._learn(iteration, dialogues)
        clock.lap("learner")
        metrics += await self._parts.sync(iteration + 1)
        clock.lap("sync")
        metrics += await self._parts.service_metrics()
        path = dialogues_path(self._output, phase=Phase.train, iteration=iteration + 1)
        write_dialogues(path, dialogues, iteration=iteration + 1, phase=Phase.train, rewards=rewards, advantages=advantages)
        self._record(iteration + 1, dialogues, [*metrics, *dialogue_metrics(dialogues, rewards)], clock)
        self.progress.iteration = iteration + 1
        self.progress.sampler = self._sampler.state()
        await self._maybe_save()

    def _tasks(self, iteration: int) -> list[DialogueTask]:
        personas = self._sampler.next(self._config.rollout.batch_size)
        return [
            DialogueTask(
                id=f"train-{iteration:06d}-{group:04d}-{member:02d}",
                group_id=f"{iteration:06d}-{group:04d}",
                persona=persona,
                seed=derive_seed(self._config.seed, iteration, group, member),
            )
            for group, persona in enumerate(personas)
            for member in range(self._config.algorithm.group_size)
        ]

    def _limits(self, max_turns: int, temperature: float) -> CollectLimits:
        rollout = self._config.rollout
        return CollectLimits(
            max_turns=max_turns,
            max_reply_tokens=rollout.max_reply_tokens,
            max_context_tokens=self._config.model.max_context_tokens,
            end_on_truncation=rollout.end_on_truncation,
            temperature=temperature,
            max_concurrent=rollout.max_concurrent,
            request_timeout_s=rollout.request_timeout_s,
        )

    async def _collect(self, name: str, tasks: list[DialogueTask], users: RespondFn, limits: CollectLimits) -> list[Dialogue]:
        parts = self._parts
        with parts.console.phase(name, len(tasks)) as advance:
            seen = 0

            def progress(done: int, total: int, replies: int) -> None:
                nonlocal seen
                advance(done - seen, replies=replies)
                seen = done

            return await collect(
                tasks, generate=parts.generate, respond=users, renderer=parts.renderer, limits=limits, on_progress=progress
            )

    async def _learn(self, iteration: int, dialogues: list[Dialogue]) -> tuple[dict[str, float], dict[str, float], list[Metric]]:
        """Rewards and advantages by dialogue id, and metrics."""
        selection = select_trainable(dialogues)
        algorithm = self._config.algorithm
        rewards = {dialogue.id: dialogue_reward(dialogue, algorithm.end_rewards) for dialogue in selection.kept}
        metrics = [Metric("rollout/dropped_groups", selection.num_dropped_groups, Reduction.sum)]
        samples = samples_of(selection.kept, rewards)
        if not samples:
            self._parts.console.note(f"iteration {iteration + 1}: no complete group of dialogues, nothing to learn from")
            return rewards, {}, metrics
        with self._parts.console.phase(f"iteration {iteration + 1}: update", 1) as advance:
            in_reward = algorithm.kl_coef > 0 and algorithm.kl_placement is KLPlacement.reward
            credited = assign_credit(samples, algorithm, await self._parts.learner.kl_sums(samples) if in_reward else None)
            metrics += await self._parts.learner.update(samples, [credited[sample.dialogue_id] for sample in samples])
            advance(1)
        return rewards, credited, metrics

    def _record(self, number: int, dialogues: list[Dialogue], metrics: list[Metric], clock: _Clock) -> None:
        sampled = sum(len(turn.reply_ids) for dialogue in dialogues for turn in dialogue.turns)
        totals = self.progress.totals
        for key, more in (("dialogues_total", len(dialogues)), ("sampled_tokens_total", sampled)):
            totals[key] = totals.get(key, 0) + more
        values = reduce_metrics(
            [
                *metrics,
                *(Metric(f"time/{name}_s", seconds, Reduction.last) for name, seconds in clock.laps.items()),
                Metric("time/iteration_s", sum(clock.laps.values()), Reduction.last),
                Metric("perf/rollout_tokens_per_s", sampled / clock.laps["rollout"], Reduction.last),
                Metric("progress/iteration", number, Reduction.last),
                *(Metric(f"progress/{key}", total, Reduction.last) for key, total in totals.items()),
            ]
        )
        self.progress.curve.append(values["reward/emotion_final"])
        for tracker in self._parts.trackers:
            tracker.log(number, values)
        self._parts.console.iteration(values)

    async def _maybe_save(self) -> None:
        done, every = self.progress.iteration, self._config.save_every
        if done == self._config.num_iterations or (every and done % every == 0):
            await self.save()

    async def save(self) -> Path:
        """Write a checkpoint of the finished iterations."""
        with self._parts.console.phase("checkpoint", 1) as advance:
            aside = self._store.begin(self.progress.iteration)
            await self._parts.learner.save(aside)
            final = self._store.commit(aside, self.progress)
            advance(1)
        return final

    async def _evaluate(self, phase: Phase) -> HeldOut:
        evaluation = self._config.evaluation
        tasks = evaluation_tasks(self._evaluation, phase=phase.value, seed=self._config.seed)
        limits = self._limits(evaluation.max_turns, evaluation.temperature)
        dialogues = await self._collect(f"evaluation {phase.value}", tasks, self._parts.evaluation_users, limits)
        scores = {dialogue.id: dialogue.final_emotion / 100 for dialogue in dialogues}
        with self._parts.console.phase(f"controls {phase.value}", 1) as advance:
            held = [dialogue for dialogue in dialogues if dialogue.end_reason is not EndReason.INFRASTRUCTURE]
            samples = samples_of(held, scores)
            nll, tokens = await self._parts.learner.base_nll(samples) if samples else (math.nan, 1)
            results = summarize(
                dialogues, self._evaluation, self._parts.second_appraiser, self._parts.evaluation_rules, math.exp(nll / max(tokens, 1))
            )
            advance(1)
        iteration = self.progress.iteration
        path = dialogues_path(self._output, phase=phase, iteration=iteration)
        write_dialogues(path, dialogues, iteration=iteration, phase=phase, rewards=scores)
        return results


class _Clock:
    """Seconds of an iteration's phases, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """End the phase `name`."""
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now
