"""`CriticLearner`: one rank of the data-parallel training of PPO's value function.

As the policy learner, a plain class that is wrapped as an actor in `cluster/`, one a process; every method is
collective. A backbone that learns is trained with its head by one engine. A frozen backbone stays outside: a
whole replica on each rank turns tokens into features, once an iteration, and the engine trains the head on
them, in float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlver_dist.algorithms import losses
from rlver_dist.bundled_models import resolve
from rlver_dist.config.enums import CriticTrunk, Precision
from rlver_dist.config.run import RunConfig
from rlver_dist.experience.balance import split_updates
from rlver_dist.experience.packing import Columns, PackedRow, column, require_columns
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner import engine
from rlver_dist.learner.rank import LearnerRank
from rlver_dist.learner.rows import collect_columns
from rlver_dist.learner.tally import Tally
from rlver_dist.learner.value_model import ValueHead, ValueModel, frozen_features, load_backbone
from rlver_dist.tracking.metrics import Metric, Reduction


@dataclass(kw_only=True, slots=True)
class Batch:
    """This rank's rows of one optimizer step.

    Attributes:
        num_trained: trained tokens of the step, over all ranks.
        rows: the packed rows.
        inputs: what the engine's forward pass takes, for each row: the row's tensors, or its features.
    """

    num_trained: int
    rows: list[PackedRow]
    inputs: list[tuple[Any, ...]]


class CriticLearner(LearnerRank):
    """Owns the critic's weights: values, updates, saves."""

    def __init__(self, *, config: RunConfig, **place: Any) -> None:
        """Join the process group at `place` (see `LearnerRank`), load the backbone and build the engine."""
        super().__init__(config.critic, **place)
        self._config = config.critic
        self._num_updates = config.algorithm.updates_per_iteration
        self._frozen = config.critic.trunk is CriticTrunk.frozen
        self._backbone, self._engine = self._build(config)
        self._latest: tuple[list[TurnSample], list[Batch]] = ([], [])

    def _build(self, config: RunConfig) -> tuple[torch.nn.Module, engine.TrainingEngine]:
        """The backbone, and the engine around what learns."""
        critic, dtype, path = config.critic, config.model.dtype, resolve(config.model.path)
        settings = engine.deepspeed_config(critic, Precision.float32 if self._frozen else dtype)
        if self._frozen:
            backbone = (
                load_backbone(path, getattr(torch, dtype.value), critic.num_layers)
                .requires_grad_(False)
                .eval()
                .to(self._device)
            )
        else:
            with engine.sharded_construction(settings):
                backbone = load_backbone(path, getattr(torch, dtype.value), critic.num_layers)
        head = ValueHead(backbone.config.hidden_size, critic.head_units, config.seed)
        model = head if self._frozen else ValueModel(backbone, head, recompute=critic.gradient_checkpointing)
        return backbone, engine.TrainingEngine(
            model, config=critic, settings=settings, world_size=self._world_size, tag="critic"
        )

    @torch.no_grad()
    def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Value of the state before each trained token: `[n_i]` float32 for each sample, in reward; the same
        on every rank."""
        batches = self._batches(samples)
        rows = [row for batch in batches for row in batch.rows]
        values = [self._engine.forward(*inputs) for batch in batches for inputs in batch.inputs]
        return collect_columns(samples, rows, values, self._device)

    def update(self, samples: list[TurnSample], values: Columns, returns: Columns) -> list[Metric]:
        """Train `critic.epochs` times over the samples, in `algorithm.updates_per_iteration` optimizer steps
        along whole groups each.

        Args:
            samples: all samples of the iteration, on every rank, in one order.
            values: `[n_i]` for each sample: those that `values` gave, which the loss is clipped around.
            returns: `[n_i]` for each sample: the targets.

        Returns:
            This rank's metrics; means are weighted by this rank's trained tokens.

        Raises:
            RlverError: the gradient is not finite.
            ValueError: values or returns do not fit the samples.
        """
        started = time.perf_counter()
        require_columns(samples, values=values, returns=returns)
        tally = Tally()
        batches = self._batches(samples)
        for _ in range(self._config.epochs):
            for batch in batches:
                for row, inputs in zip(batch.rows, batch.inputs, strict=True):
                    self._accumulate(
                        inputs, column(values, row), column(returns, row), batch.num_trained, tally
                    )
                tally.add("lr", self._engine.lr, 1)
                tally.add("grad_norm", self._engine.step(), 1)
        self._latest = ([], [])
        engine.return_freed_memory()
        elapsed = time.perf_counter() - started
        return [
            *tally.metrics("critic/"),
            *_fit(values, returns),
            Metric("time/critic_update_s", elapsed, Reduction.max),
        ]

    def _accumulate(
        self, inputs: tuple[Any, ...], old_values: Tensor, returns: Tensor, num_trained: int, tally: Tally
    ) -> None:
        """Add one row's gradient."""
        values = self._engine.forward(*inputs)
        loss, sums = losses.value_loss(values, old_values, returns, self._config.value_clip, num_trained)
        self._engine.backward(loss)
        for name, (total, count) in sums.items():
            tally.add(name, total, count)
        tally.add("value_loss", loss.item() * num_trained, len(values))

    def _batches(self, samples: list[TurnSample]) -> list[Batch]:
        """This rank's work on `samples`. Kept until the update, since `values` is asked for the same samples
        before it."""
        if not self._latest[1] or self._latest[0] != samples:
            parts = split_updates([sample.group_id for sample in samples], self._num_updates)
            self._latest = (samples, [self._batch(samples, part) for part in parts])
        return self._latest[1]

    def _batch(self, samples: list[TurnSample], part: list[int]) -> Batch:
        rows = self._share(samples, part)
        return Batch(
            num_trained=sum(samples[index].num_trained for index in part),
            rows=rows,
            inputs=[self._inputs(row) for row in rows],
        )

    def _inputs(self, row: PackedRow) -> tuple[Any, ...]:
        return (
            (frozen_features(self._backbone, row),)
            if self._frozen
            else (row.token_ids, row.position_ids, row.spans, row.logit_index)
        )


def _fit(values: Columns, returns: Columns) -> list[Metric]:
    """How the values that an update started from fit the returns, over all trained tokens of all ranks;
    nothing for no token.

    Explained variance is 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is what a constant does.
    Equal returns leave nothing to explain.
    """
    if not values:
        return []
    predicted, target = torch.cat(list(values)).double(), torch.cat(list(returns)).double()
    variance = float(target.var(correction=0))
    unexplained = float((target - predicted).var(correction=0))
    return [
        Metric("critic/value_mean", float(predicted.mean()), Reduction.last),
        Metric("critic/return_mean", float(target.mean()), Reduction.last),
        Metric(
            "critic/explained_variance",
            1 - unexplained / variance if variance else 0.0,
            Reduction.mean,
            float(variance > 0),
        ),
    ]
