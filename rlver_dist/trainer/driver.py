"""The loop.

Rules that bind the parts (`components.py`): one iteration is collect, update, sync, in that order, so every
reply is sampled by the newest weights; a policy version is the number of finished iterations; failed
dialogues are data until `training_step` leaves them out, in one place; the driver awaits plain coroutines and
knows neither Ray nor vLLM nor DeepSpeed, so the same loop runs over any parts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rlver_dist.concurrency import all_or_none
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.dialogue import Dialogue
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.ledger.parquet import dialogues_path, drop_later, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import DialogueTask
from rlver_dist.seeding import derive_seed
from rlver_dist.tracking.dialogue_metrics import dialogue_metrics
from rlver_dist.tracking.metrics import Metric, Reduction, reduce_metrics
from rlver_dist.trainer.checkpoints import CheckpointStore, Progress
from rlver_dist.trainer.components import Parts, followed, rollout, train_limits
from rlver_dist.trainer.evaluation_stage import evaluate
from rlver_dist.trainer.training_step import StepResult, training_step
from rlver_dist.trainer.warm_up import warm_up, warm_up_dialogues


class Driver:
    """Runs one configuration over its parts."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        train: Sequence[Persona],
        evaluation: Sequence[Persona],
        *,
        started: float | None = None,
    ) -> None:
        """`started`: `time.monotonic()` at the run's start, None for now."""
        self._config = config
        self._parts = parts
        self._train = train
        self._evaluation = list(evaluation[: config.evaluation.num_personas])
        self._sampler = PersonaSampler(train, config.seed)
        self._output = Path(config.output_dir)
        self._store = CheckpointStore(self._output, config.keep_checkpoints)
        self._started = time.monotonic() if started is None else started
        self._earlier_s = 0.0
        self._saved = 0
        self._between_states = False
        self.progress = Progress(
            iteration=0,
            sampler=self._sampler.state(),
            totals={},
            curve=[],
            before={},
            finished_phases={},
            warmed_up=False,
            control={},
            kl_coef=config.algorithm.kl_coef,
            wall_s=0.0,
            shape=config.resume_fingerprint | parts.ranks,
        )

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, earlier starts included."""
        return self._earlier_s + time.monotonic() - self._started

    async def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint: counters, sampler, results before training, learners."""
        self.progress = CheckpointStore.read(checkpoint)
        # An adapted weight goes on from where it was, except from 0, which no adapting leaves.
        if self._config.algorithm.kl_target == 0 or self.progress.kl_coef == 0:
            self.progress.kl_coef = self._config.algorithm.kl_coef
        self._earlier_s, self._saved = self.progress.wall_s, self.progress.iteration
        self._sampler.restore(self.progress.sampler)
        if checkpoint.resolve().parent.parent != self._output.resolve():
            self.progress.finished_phases = {}  # the ledger of another run is not here
        if self.progress.iteration > 0:
            for learner in self._learners():
                await learner.load(checkpoint)
        self._parts.console.note(f"resumed from {checkpoint} after {self.progress.iteration} iterations")

    async def run(self) -> tuple[HeldOut | None, HeldOut | None]:
        """Warm up, evaluate, train, evaluate, export. Returns the results before and after; None where
        evaluation is off.

        Cancelled while it trains, it finishes an update that has begun, saves what is not saved yet, and
        passes the cancellation on; cancelled again, it leaves the update alone and saves nothing. A failure
        while it trains is passed on likewise; nothing is saved where it came in the midst of an update or of
        a checkpoint.

        Raises:
            BoundaryError: every dialogue of an iteration or an evaluation failed.
            BudgetError: the users' budget is used up.
            Exception: whatever a part raises, such as a sync that misses an engine.
        """
        drop_later(self._output, self.progress.iteration)
        await self._parts.sync(self.progress.iteration)
        self._parts.forecast.score_rate = await self._parts.policy.score_rate()
        foretelling = asyncio.create_task(self._foretell())
        try:
            before = await self._start()
            await self._train_to_the_end()
            after = await self._evaluate(Phase.after) if self._evaluation else None
        finally:
            foretelling.cancel()
        with self._parts.console.phase("exporting policy", 1) as advance:
            await self._parts.policy.export(self._output / "policy")
            advance(1)
        return before, after

    async def _train_to_the_end(self) -> None:
        try:
            for iteration in range(self.progress.iteration, self._config.num_iterations):
                await self._iterate(iteration)
        except (asyncio.CancelledError, Exception):
            if self.progress.iteration > self._saved and not self._between_states:
                await self.save()
            raise

    async def _foretell(self) -> None:
        """Say how long the rest takes, once there are rates to tell it by."""
        while not self._parts.forecast.ready:
            await asyncio.sleep(1)
        progress, last = self.progress, self._config.num_iterations
        still = [
            self._warms_up and not progress.control,
            not progress.before and progress.iteration == 0,
            True,
        ]
        told = self._parts.forecast.text(
            warms_up=self._warms_up,
            evaluations=sum(still) if self._evaluation else 0,
            iterations=last - progress.iteration,
        )
        self._parts.console.note(told)

    def _learners(self) -> list:
        return [self._parts.policy, *([self._parts.critic] if self._parts.critic else [])]

    @property
    def _warms_up(self) -> bool:
        """Whether the format warm-up is still to come."""
        progress, config = self.progress, self._config
        return (
            config.rollout.think
            and config.warm_up.dialogues > 0
            and progress.iteration == 0
            and not progress.warmed_up
        )

    async def _start(self) -> HeldOut | None:
        """What comes before the first iteration, once a run: warm-up and evaluation. Each part is kept as
        soon as it is done."""
        progress = self.progress
        if self._warms_up:
            config, parts, train = self._config, self._parts, self._train
            kept = progress.finished_phases.get(Phase.warm_up.value)
            replies = partial(
                warm_up_dialogues, config=config, parts=parts, train=train, kept=kept, keep=self._keep
            )
            if len(self._evaluation) + config.warm_up.dialogues <= config.rollout.max_concurrent:
                # Both are sampled by the base model, and an engine's step costs little more for twice the
                # dialogues.
                _, dialogues = await all_or_none((self._control(), replies()))
            else:
                await self._control()
                dialogues = await replies()
            await warm_up(dialogues or [], config=config, parts=parts, train=train)
            progress.warmed_up, progress.before = True, {}
            progress.finished_phases.pop(Phase.before.value, None)  # of another policy than the warmed-up one
            await self._whole(self.save())
        if self._evaluation and not progress.before and progress.iteration > 0:
            self._parts.console.note(
                "the run began without an evaluation, so there is none to compare the one at its end with"
            )
        elif self._evaluation and not progress.before:
            progress.before = asdict(await self._evaluate(Phase.before))
            await self._whole(self.save())
        return HeldOut(**progress.before) if progress.before else None

    async def _control(self) -> None:
        """The evaluation of the base model, which replies without thinking."""
        if self._evaluation and not self.progress.control:
            self.progress.control = asdict(await self._evaluate(Phase.control))
            await self._whole(self.save())

    async def _evaluate(self, phase: Phase) -> HeldOut:
        """One evaluation; the control replies without thinking."""
        parts, first = self._parts, phase is not Phase.after
        return await evaluate(
            phase,
            config=self._config,
            parts=parts,
            personas=self._evaluation,
            iteration=self.progress.iteration,
            renderer=parts.plain_renderer if phase is Phase.control else parts.renderer,
            kept=self.progress.finished_phases.get(phase.value) if first else None,
            keep=self._keep if first else None,
        )

    async def _keep(self, phase: Phase, limits: str) -> None:
        self.progress.finished_phases[phase.value] = limits
        await self._whole(self.save())

    async def _iterate(self, iteration: int) -> None:
        clock = _Clock()
        dialogues = await rollout(
            self._parts,
            f"iteration {iteration + 1}: rollout",
            self._tasks(iteration),
            self._parts.users,
            train_limits(self._config),
            self._parts.renderer,
        )
        clock.lap("rollout")
        await self._whole(self._learn(iteration, dialogues, clock))
        done, every = self.progress.iteration, self._config.save_every
        if done == self._config.num_iterations or (every and done % every == 0):
            await self._whole(self.save())

    async def _whole(self, work: Coroutine[Any, Any, Any]) -> None:
        """Await `work` to its end, also where this task is cancelled once meanwhile: in its midst there is no
        state to save."""
        self._between_states = True
        running = asyncio.ensure_future(work)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.shield(running)
            self._between_states = False
            raise
        self._between_states = False

    async def _learn(self, iteration: int, dialogues: list[Dialogue], clock: _Clock) -> None:
        """Update, sync, write down, count; a failed sync is raised only then, since the learners hold what
        has been counted."""
        parts, critic = self._parts, self._config.critic
        training = training_step(
            dialogues,
            config=self._config,
            policy=parts.policy,
            critic=parts.critic,
            kl_coef=self.progress.kl_coef,
            critic_only=parts.critic is not None and iteration < critic.pretrain_iterations,
        )
        learned = await followed(parts, f"iteration {iteration + 1}: update", training)
        if not learned.advantages:
            parts.console.note(
                f"iteration {iteration + 1}: no complete group of dialogues, nothing to learn from"
            )
        clock.lap("learner")
        synced, failure = await self._synced(iteration + 1)
        clock.lap("sync")
        self._write(iteration + 1, dialogues, learned)
        metrics = [*learned.metrics, *synced, *dialogue_metrics(dialogues, learned.rewards)]
        self._record(iteration + 1, dialogues, metrics, clock)
        self.progress.iteration = iteration + 1
        self.progress.sampler = self._sampler.state()
        self.progress.kl_coef = learned.kl_coef
        if failure is not None:
            # Only the engines lag behind, and a resume syncs them first.
            self._between_states = False
            raise failure

    async def _synced(self, version: int) -> tuple[list[Metric], Exception | None]:
        """Bring the engines to `version` and ask all services for their metrics. Returns the metrics and what
        failed."""
        metrics: list[Metric] = []
        try:
            metrics += await self._parts.sync(version)
            metrics += await self._parts.service_metrics()
        except Exception as error:
            return metrics, error
        return metrics, None

    def _tasks(self, iteration: int) -> list[DialogueTask]:
        personas = self._sampler.next(self._config.num_personas)
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

    def _write(self, number: int, dialogues: list[Dialogue], learned: StepResult) -> None:
        path = dialogues_path(self._output, phase=Phase.train, iteration=number)
        write_dialogues(
            path,
            dialogues,
            iteration=number,
            phase=Phase.train,
            rewards=learned.rewards,
            advantages=learned.advantages,
        )

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
                Metric("time/left_s", self._left_s(number, sum(clock.laps.values())), Reduction.last),
                Metric("perf/rollout_tokens_per_s", sampled / clock.laps["rollout"], Reduction.last),
                Metric("progress/iteration", number, Reduction.last),
                *(Metric(f"progress/{key}", total, Reduction.last) for key, total in totals.items()),
            ]
        )
        self.progress.curve.append(values["reward/emotion_final"])
        for tracker in self._parts.trackers:
            tracker.log(number, values)
        self._parts.console.iteration(values)

    def _left_s(self, number: int, iteration_s: float) -> float:
        return self._parts.forecast.left_s(
            iterations=self._config.num_iterations - number, iteration_s=iteration_s
        )

    async def save(self) -> Path:
        """Write a checkpoint of the finished iterations; before the first one there is no state of the
        learners to write."""
        self.progress.wall_s = self.wall_s
        if self.progress.iteration == 0:
            return self._store.commit(self._store.begin(0), self.progress)
        with self._parts.console.phase("checkpoint", 1) as advance:
            aside = self._store.begin(self.progress.iteration)
            for learner in self._learners():
                await learner.save(aside)
            final = self._store.commit(aside, self.progress)
            self._saved = self.progress.iteration
            advance(1)
        return final


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
