"""The warm-up stage: dialogues without thinking, then the think format learned from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from rlver_dist.cluster.components import Components
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.trainer.checkpoints import WARM_START
from rlver_dist.trainer.stages import KeepFn, followed, kept_dialogues, rollout, train_limits
from rlver_dist.trainer.warm_up import reply_limits, reply_tasks, warm_up_samples


class WarmUpStage:
    """Teaches the policy the think format on its own replies."""

    def __init__(
        self,
        components: Components,
        personas: Sequence[Persona],
        *,
        warm_up: WarmUpConfig,
        rollout: RolloutConfig,
        max_context_tokens: int,
        seed: int,
        output: Path,
    ) -> None:
        """
        Args:
            components: of the run.
            personas: of training.
            warm_up: how much is learned.
            rollout: of training.
            max_context_tokens: of the policy's model.
            seed: of the run.
            output: the run's folder.
        """
        self._components = components
        self._warm_up = warm_up
        self._thinks = rollout.think
        self._seed = seed
        self._output = output
        self._limits = train_limits(rollout, max_context_tokens)
        self._reply_limits = reply_limits(self._limits, warm_up, rollout)
        self._tasks = reply_tasks(personas, warm_up.dialogues, seed)

    @property
    def is_on(self) -> bool:
        """Whether the run has this stage: without thinking there is no format to teach."""
        return self._thinks and self._warm_up.dialogues > 0

    @property
    def num_dialogues(self) -> int:
        """Dialogues that are learned from."""
        return self._warm_up.dialogues

    async def dialogues(self, kept: str | None, keep: KeepFn) -> list[Dialogue]:
        """Hold the dialogues whose replies are learned from, and write them to the ledger.

        Args:
            kept: limits of the dialogues that an interrupted start has left in the ledger
                (`kept_dialogues`).
            keep: called as soon as the ledger has them.
        """
        components = self._components
        path = dialogues_path(self._output, phase=Phase.warm_up, iteration=0)
        dialogues = kept_dialogues(path, self._tasks, self._reply_limits, kept)
        if dialogues is None:
            dialogues = await rollout(
                components,
                "warm-up: replies",
                self._tasks,
                components.users,
                self._reply_limits,
                components.plain_renderer,
            )
            # No rewards: the stage learns nothing of what a reply is worth.
            write_dialogues(path, dialogues, iteration=0, phase=Phase.warm_up, rewards={})
            await keep(Phase.warm_up, repr(self._reply_limits))
        return dialogues

    async def learn(self, dialogues: list[Dialogue]) -> None:
        """Teach the policy the format on `dialogues`, export the result and bring the engines to it.

        Raises:
            ConfigError: the dialogues give fewer samples than one batch takes.
        """
        components = self._components
        samples = await warm_up_samples(
            dialogues,
            tasks=self._tasks,
            warm_up=self._warm_up,
            tokenizer=components.tokenizer,
            plain=components.plain_renderer,
            thinking=components.renderer,
            limits=self._limits,
            collect=functools.partial(rollout, components),
        )
        imitating = components.policy.imitate(samples, self._warm_up, self._seed)
        values = reduce_metrics(await followed(components, "warm-up: imitation", imitating, "replies"))
        components.console.note(
            f"warm-up: {len(samples)} replies, nats a token: format {values['warm_up/format_nll_first']:.2f} "
            f"-> {values['warm_up/format_nll_last']:.2f}, replies from the base model "
            f"{values['warm_up/reply_kl_first']:.2f} -> "
            f"{values['warm_up/reply_kl_last']:.2f}"
        )
        # A resumed run starts its learner from this folder; with a KL term it is the reference, too.
        await components.policy.export(self._output / WARM_START)
        # Still version 0: no iteration is finished.
        await components.sync(0)
