"""The loop.

One iteration is collect, update, sync, in that order, so every reply is sampled by the newest weights. A
policy version is the number of finished iterations. Failed dialogues are data until `training_step` leaves
them out, in one place. The driver awaits plain coroutines and knows neither Ray nor vLLM nor DeepSpeed, so
the same loop runs over any components.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlver_dist.cluster.components import Components
from rlver_dist.concurrency import to_the_end
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.data.sampler import PersonaSampler
from rlver_dist.dialogue import Dialogue
from rlver_dist.errors import WeightMismatchError
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.ledger.parquet import dialogues_path, drop_later, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.rollout.collector import DialogueTask
from rlver_dist.seeding import derive_seed
from rlver_dist.tracking.dialogue_metrics import dialogue_metrics
from rlver_dist.tracking.metrics import Metric
from rlver_dist.trainer.checkpoints import CheckpointStore, Progress
from rlver_dist.trainer.evaluation_stage import EvaluationStage
from rlver_dist.trainer.iteration_metrics import Clock, count_up, iteration_metrics
from rlver_dist.trainer.preparation import Preparation
from rlver_dist.trainer.stages import followed, rollout, train_limits
from rlver_dist.trainer.training_step import training_step
from rlver_dist.trainer.warm_up_stage import WarmUpStage


@dataclass(kw_only=True, slots=True)
class SyncResult:
    """What the engines' way to a new version gave.

    Attributes:
        metrics: of the sync and of all services; what was there before a failure.
        failure: what went wrong; None where nothing did.
    """

    metrics: list[Metric]
    failure: Exception | None


class Driver:
    """Runs one configuration over its `Components`.

    What each component consumes, produces and waits for:

    generate
        consumes a prompt with the seed and limits of its reply; produces sampled token ids and their
        log-probs; waits for the user's message, and for the sync of the newest weights.
    users, evaluation_users
        consume a talk up to its newest reply; produce appraisal, emotion and the next message; wait for that
        reply.
    critic
        consumes the samples of an iteration, then their returns; produces values, then metrics; waits for all
        dialogues of the iteration.
    policy
        consumes samples and advantages; produces new weights and metrics; waits for the critic's values, and
        for its own KL tokens where the reward takes them. Its update and the critic's run at the same time.
        It also scores held-out replies with the base model, which waits for their dialogues.
    sync
        consumes the number of finished iterations; produces engines with the policy's weights, and the
        probe's metrics; waits for both updates.
    service_metrics
        consumes nothing; produces what users and engines have counted; waits for the sync.
    trackers, console
        consume the iteration's reduced metrics; wait for the services' metrics.
    second_judge
        consumes finished held-out dialogues; produces their emotions once more; waits for all of an
        evaluation.
    forecast
        consumes each reply, and the policy's measured rate; produces the time left; waits for a minute of
        sampling.
    """

    def __init__(
        self,
        config: RunConfig,
        components: Components,
        train: Sequence[Persona],
        evaluation: Sequence[Persona],
        *,
        started: float | None = None,
    ) -> None:
        """`started`: `time.monotonic()` at the run's start, None for now."""
        self._config = config
        self._components = components
        self._sampler = PersonaSampler(train, config.seed)
        self._output = Path(config.output_dir)
        self._store = CheckpointStore(self._output, config.keep_checkpoints)
        self._started = time.monotonic() if started is None else started
        self._earlier_s = 0.0
        # Iterations that the newest checkpoint holds.
        self._saved = 0
        self._evaluation = EvaluationStage(
            components,
            evaluation[: config.evaluation.num_personas],
            evaluation=config.evaluation,
            rollout=config.rollout,
            simulator=config.simulator,
            max_context_tokens=config.model.max_context_tokens,
            seed=config.seed,
            output=self._output,
        )
        self._warm_up = WarmUpStage(
            components,
            train,
            warm_up=config.warm_up,
            rollout=config.rollout,
            max_context_tokens=config.model.max_context_tokens,
            seed=config.seed,
            output=self._output,
        )
        self.progress = Progress(
            iteration=0,
            sampler=self._sampler.state(),
            totals={},
            curve=[],
            before=None,
            finished_phases={},
            warmed_up=False,
            control=None,
            kl_coef=config.algorithm.kl_coef,
            wall_s=0.0,
            # Each rank saves its own part of the optimizer, so their number belongs to what a save fits.
            shape=config.resume_fingerprint | components.ranks,
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
        self._earlier_s = self.progress.wall_s
        self._saved = self.progress.iteration
        self._sampler.restore(self.progress.sampler)
        if checkpoint.resolve().parent.parent != self._output.resolve():
            self.progress.finished_phases = {}  # the ledger of another run is not here
        # Before the first iteration the learners are as the model's folder, or the warm-up's, makes them.
        if self.progress.iteration > 0:
            for learner in self._components.learners:
                await learner.load(checkpoint)
        self._components.console.note(f"resumed from {checkpoint} after {self.progress.iteration} iterations")

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
            Exception: whatever a component raises, such as a sync that misses an engine.
        """
        # Dialogues of iterations that no checkpoint has will be held again.
        drop_later(self._output, self.progress.iteration)
        # Engines load the model's folder, and a policy that is resumed or warmed up is elsewhere by now.
        await self._components.sync(self.progress.iteration)
        self._components.forecast.score_rate = await self._components.policy.score_rate()
        preparation = Preparation(
            self.progress,
            evaluation=self._evaluation,
            warm_up=self._warm_up,
            max_concurrent=self._config.rollout.max_concurrent,
            console=self._components.console,
            save=self._save_to_the_end,
        )
        # Beside the run: the rates are there in the midst of the first long stage.
        foretelling = asyncio.create_task(self._foretell(preparation))
        after = None
        try:
            await preparation.run()
            await self._train_to_the_end()
            # Nothing comes after it that could fail and make a next start repeat it, so it keeps nothing.
            if self._evaluation.num_dialogues:
                after = await self._evaluation.run(Phase.after, iteration=self.progress.iteration)
        finally:
            foretelling.cancel()
        with self._components.console.phase("exporting policy", 1) as advance:
            await self._components.policy.export(self._output / "policy")
            advance(1)
        return self.progress.before, after

    async def save(self, *, trusted: bool = True) -> Path:
        """Write a checkpoint of the finished iterations, or where it is not `trusted` a folder that no start
        takes by itself; before the first iteration there is no state of the learners to write."""
        self.progress.wall_s = self.wall_s
        if self.progress.iteration == 0:
            return self._store.commit(self._store.begin(0), self.progress)
        with self._components.console.phase("checkpoint", 1) as advance:
            aside = self._store.begin(self.progress.iteration)
            for learner in self._components.learners:
                await learner.save(aside)
            if trusted:
                final = self._store.commit(aside, self.progress)
                self._saved = self.progress.iteration
            else:
                final = self._store.set_aside(aside, self.progress)
            advance(1)
        return final

    async def _save_to_the_end(self) -> None:
        """Save, also where this task is cancelled meanwhile: half a checkpoint is none."""
        _, cancellation = await to_the_end(self.save())
        if cancellation is not None:
            raise cancellation

    async def _save_the_unsaved(self) -> None:
        """Save where iterations were finished since the last checkpoint."""
        if self.progress.iteration > self._saved:
            await self.save()

    async def _foretell(self, preparation: Preparation) -> None:
        """Say how long the rest takes, once there are rates to tell it by."""
        while not self._components.forecast.ready:
            await asyncio.sleep(1)
        told = self._components.forecast.text(
            warms_up=preparation.warms_up,
            evaluations=preparation.num_evaluations + 1 if self._evaluation.num_dialogues else 0,
            iterations=self._config.num_iterations - self.progress.iteration,
        )
        self._components.console.note(told)

    async def _train_to_the_end(self) -> None:
        """All iterations that are left, with a checkpoint wherever one is due or the run ends early."""
        config = self._config
        for iteration in range(self.progress.iteration, config.num_iterations):
            clock = Clock()
            try:
                dialogues = await self._collect(iteration)
            except (asyncio.CancelledError, Exception):
                # No update has begun: the learners hold what the last iteration left.
                await self._save_the_unsaved()
                raise
            clock.lap("rollout")
            # What is raised here, by a learner or by a second cancellation, came in the midst of an update:
            # the learners then hold a state between two, which no checkpoint may have.
            synced, cancellation = await to_the_end(self._learn(iteration, dialogues, clock))
            failure = cancellation if synced.failure is None else synced.failure
            if failure is not None:
                # The iteration is counted and its learners are whole. Engines that lag behind are no loss,
                # since a resume syncs them first. Engines that disagree with the learner may be right: a
                # checkpoint of such weights would be resumed, and would replace a good one.
                try:
                    if isinstance(synced.failure, WeightMismatchError):
                        kept = await self.save(trusted=False)
                        self._components.console.note(f"kept for study, and not as a checkpoint: {kept}")
                    else:
                        await self._save_the_unsaved()
                finally:
                    # Also where saving fails, too: what came first says more.
                    raise failure
            done = self.progress.iteration
            if done == config.num_iterations or (config.save_every and done % config.save_every == 0):
                await self._save_to_the_end()

    async def _collect(self, iteration: int) -> list[Dialogue]:
        config = self._config
        return await rollout(
            self._components,
            f"iteration {iteration + 1}: rollout",
            self._tasks(iteration),
            self._components.users,
            train_limits(config.rollout, config.model.max_context_tokens),
            self._components.renderer,
        )

    def _tasks(self, iteration: int) -> list[DialogueTask]:
        # The width of each number makes sorting by id sorting by number.
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

    async def _learn(self, iteration: int, dialogues: list[Dialogue], clock: Clock) -> SyncResult:
        """Update, sync, write down, count. A failed sync is returned, since the learners hold by then what
        has to be counted; any other failure is raised."""
        components, progress = self._components, self.progress
        number = iteration + 1
        training = training_step(
            dialogues,
            algorithm=self._config.algorithm,
            policy=components.policy,
            critic=components.critic,
            kl_coef=progress.kl_coef,
            critic_only=components.critic is not None and iteration < self._config.critic.pretrain_iterations,
        )
        learned = await followed(components, f"iteration {number}: update", training)
        # The engines are synced all the same, so that every iteration is a policy version.
        if not learned.advantages:
            components.console.note(
                f"iteration {number}: no complete group of dialogues, nothing to learn from"
            )
        clock.lap("learner")
        synced = await self._sync(number)
        clock.lap("sync")
        write_dialogues(
            dialogues_path(self._output, phase=Phase.train, iteration=number),
            dialogues,
            iteration=number,
            phase=Phase.train,
            rewards=learned.rewards,
            advantages=learned.advantages,
        )
        metrics = [*learned.metrics, *synced.metrics, *dialogue_metrics(dialogues, learned.rewards)]
        self._record(number, dialogues, metrics, clock)
        # Last of all: until here a checkpoint would hold an iteration that is not written down.
        progress.iteration = number
        progress.sampler = self._sampler.state()
        progress.kl_coef = learned.kl_coef
        return synced

    async def _sync(self, version: int) -> SyncResult:
        """Bring the engines to `version` and ask all services for their metrics."""
        # It grows in place, so that a failure of the services leaves the metrics of the sync.
        metrics: list[Metric] = []
        try:
            metrics += await self._components.sync(version)
            metrics += await self._components.service_metrics()
        except Exception as error:
            return SyncResult(metrics=metrics, failure=error)
        return SyncResult(metrics=metrics, failure=None)

    def _record(self, number: int, dialogues: list[Dialogue], metrics: list[Metric], clock: Clock) -> None:
        """Add the iteration to totals and curve, and tell trackers and console."""
        progress = self.progress
        progress.totals = count_up(progress.totals, dialogues)
        left_s = self._components.forecast.left_s(
            iterations=self._config.num_iterations - number, iteration_s=clock.total_s
        )
        values = iteration_metrics(
            number, dialogues, metrics, clock=clock, totals=progress.totals, left_s=left_s
        )
        progress.curve.append(values["reward/emotion_final"])
        for tracker in self._components.trackers:
            tracker.log(number, values)
        self._components.console.iteration(values)
