"""What comes before the first iteration, once a run: control, warm-up, evaluation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from rlver_dist.concurrency import all_or_none
from rlver_dist.dialogue import Dialogue
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.ledger.records import Phase
from rlver_dist.tracking.console import Console
from rlver_dist.trainer.checkpoints import Progress
from rlver_dist.trainer.evaluation_stage import EvaluationStage
from rlver_dist.trainer.warm_up_stage import WarmUpStage


class Preparation:
    """Takes a run to its first iteration; goes on where an earlier start was cut off."""

    def __init__(
        self,
        progress: Progress,
        *,
        evaluation: EvaluationStage,
        warm_up: WarmUpStage,
        max_concurrent: int,
        console: Console,
        save: Callable[[], Awaitable[None]],
    ) -> None:
        """
        Args:
            progress: of the run; results and finished phases are noted in it.
            evaluation: the stage of control and evaluation.
            warm_up: the stage of the think format.
            max_concurrent: dialogues in flight.
            console: told where an evaluation is missing.
            save: keeps `progress`; called as soon as anything is done.
        """
        self._progress = progress
        self._evaluation = evaluation
        self._warm_up = warm_up
        self._max_concurrent = max_concurrent
        self._console = console
        self._save = save

    @property
    def warms_up(self) -> bool:
        """Whether the format warm-up is still to come."""
        progress = self._progress
        return self._warm_up.is_on and progress.iteration == 0 and not progress.warmed_up

    @property
    def num_evaluations(self) -> int:
        """Evaluations that are still to come before training."""
        if not self._evaluation.num_dialogues:
            return 0
        control = self.warms_up and self._progress.control is None
        before = self._progress.before is None and self._progress.iteration == 0
        return control + before

    async def run(self) -> None:
        """Do what is left of it."""
        progress = self._progress
        if self.warms_up:
            await self._warm_up.learn(await self._control_and_replies())
            progress.warmed_up = True
            # What was evaluated or held before belongs to another policy than the warmed-up one.
            progress.before = None
            progress.finished_phases.pop(Phase.before.value, None)
            await self._save()
        if not self._evaluation.num_dialogues or progress.before is not None:
            return
        if progress.iteration > 0:
            self._console.note(
                "the run began without an evaluation, so there is none to compare the one at its end with"
            )
            return
        progress.before = await self._evaluate(Phase.before)
        await self._save()

    async def _control_and_replies(self) -> list[Dialogue]:
        """Evaluate the base model, and hold the dialogues that the warm-up learns from; returns those."""
        kept = self._progress.finished_phases.get(Phase.warm_up.value)
        replies = self._warm_up.dialogues
        if self._evaluation.num_dialogues + self._warm_up.num_dialogues <= self._max_concurrent:
            # Both are sampled by the base model, and an engine's step costs little more for twice the
            # dialogues.
            _, dialogues = await all_or_none((self._control(), replies(kept, self._keep)))
            return dialogues or []
        # Together they would wait for one another's turns, and the control would end no sooner.
        await self._control()
        return await replies(kept, self._keep)

    async def _control(self) -> None:
        """The evaluation of the base model, which replies without thinking."""
        if self._evaluation.num_dialogues and self._progress.control is None:
            self._progress.control = await self._evaluate(Phase.control)
            await self._save()

    async def _evaluate(self, phase: Phase) -> HeldOut:
        return await self._evaluation.run(
            phase,
            iteration=self._progress.iteration,
            kept=self._progress.finished_phases.get(phase.value),
            keep=self._keep,
        )

    async def _keep(self, phase: Phase, limits: str) -> None:
        # Dialogues take minutes and what is made of them seconds, so they are kept by themselves.
        self._progress.finished_phases[phase.value] = limits
        await self._save()
