"""`CriticLearner`: one rank of the data-parallel training of PPO's value function.

As the policy learner, a plain class that is wrapped as an actor in `cluster/`, one a process; every method is
collective. A backbone that learns is trained with its head by one engine. A frozen backbone stays outside: a
whole replica on each rank turns tokens into features, once an iteration, and the engine trains the head on
them, in float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlver_dist.algorithms import losses
from rlver_dist.bundled_models import resolve
from rlver_dist.config.enums import CriticTrunk, Precision
from rlver_dist.config.learner import CriticConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.experience.balance import split_updates
from rlver_dist.experience.packing import Columns, PackedRow, column, require_columns
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner import engine
from rlver_dist.learner.rank import LearnerRank, RankPlace
from rlver_dist.learner.rows import collect_columns
from rlver_dist.learner.tally import Tally
from rlver_dist.learner.value_model import ValueHead, ValueModel, frozen_features, load_backbone
from rlver_dist.tracking.metrics import Metric, Reduction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(kw_only=True, slots=True, frozen=True)
class CriticSettings:
    """What a critic learner is built from.

    Attributes:
        model: the model under the value head.
        critic: the learner's own options.
        updates_per_iteration: optimizer steps of one pass over an iteration's samples.
        seed: of the head's initialisation.
    """

    model: ModelConfig
    critic: CriticConfig
    updates_per_iteration: int
    seed: int


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
    inputs: list[tuple[object, ...]]


class CriticLearner(LearnerRank):
    """Owns the critic's weights: values, updates, saves."""

    def __init__(self, settings: CriticSettings, place: RankPlace) -> None:
        super().__init__(settings.critic, place)
        self._settings = settings
        self._config = settings.critic
        self._frozen_backbone: torch.nn.Module | None = None
        self._latest: tuple[list[TurnSample], list[Batch]] = ([], [])

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group, load the backbone and build the engine around what learns.

        Args:
            master_address: host of rank 0.
            master_port: free TCP port there.

        Raises:
            ConfigError: the model has fewer layers than the critic is to keep, or cannot be trained exactly.
        """
        self._join(master_address, master_port)
        if self._config.trunk is CriticTrunk.frozen:
            self._running = self._build_on_frozen()
        else:
            self._running = self._build_whole()

    def _build_on_frozen(self) -> engine.TrainingEngine:
        """An engine around the head alone; the backbone is kept beside it, whole on every rank."""
        settings = engine.deepspeed_config(self._config, Precision.float32)
        backbone = self._load_backbone().requires_grad_(False).eval().to(self._device)
        self._frozen_backbone = backbone
        return self._build_engine(self._make_head(backbone), settings)

    def _build_whole(self) -> engine.TrainingEngine:
        """An engine around backbone and head."""
        settings = engine.deepspeed_config(self._config, self._settings.model.dtype)
        with engine.sharded_construction(settings):
            backbone = self._load_backbone()
        # The head is made outside: it is small, and initialised by hand.
        head = self._make_head(backbone)
        model = ValueModel(backbone, head, recompute=self._config.gradient_checkpointing)
        return self._build_engine(model, settings)

    def _load_backbone(self) -> PreTrainedModel:
        model = self._settings.model
        return load_backbone(resolve(model.path), getattr(torch, model.dtype.value), self._config.num_layers)

    def _make_head(self, backbone: PreTrainedModel) -> ValueHead:
        return ValueHead(backbone.config.hidden_size, self._config.head_units, self._settings.seed)

    def _build_engine(
        self, model: torch.nn.Module, settings: engine.DeepSpeedConfig
    ) -> engine.TrainingEngine:
        return engine.TrainingEngine(
            model, config=self._config, settings=settings, world_size=self._world_size, tag="critic"
        )

    @torch.no_grad()
    def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Value of the state before each trained token; the same on every rank.

        Args:
            samples: all samples of the iteration, on every rank, in one order.

        Returns:
            `[n_i]` float32 for each sample, in reward.
        """
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
            RlverError: too many gradients in a row, or weights, are not finite.
            ValueError: values or returns do not fit the samples.
        """
        started = time.perf_counter()
        require_columns(samples, values=values, returns=returns)
        tally = Tally()
        skipped = 0
        batches = self._batches(samples)
        for _ in range(self._config.epochs):
            for batch in batches:
                of_step = Tally()
                for row, inputs in zip(batch.rows, batch.inputs, strict=True):
                    self._accumulate(
                        inputs, column(values, row), column(returns, row), batch.num_trained, of_step
                    )
                of_step.add("lr", self._engine.lr, 1)
                skipped += not self._step(of_step, tally)
        self._engine.require_finite_weights()
        # The next iteration has other samples; rows and features of these would only take memory.
        self._latest = ([], [])
        engine.return_freed_memory()
        elapsed = time.perf_counter() - started
        return [
            *tally.metrics("critic/"),
            *_fit(values, returns),
            Metric("critic/skipped_steps", skipped, Reduction.max),
            Metric("time/critic_update_s", elapsed, Reduction.max),
        ]

    def _accumulate(
        self, inputs: tuple[object, ...], old_values: Tensor, returns: Tensor, num_trained: int, tally: Tally
    ) -> None:
        """Add one row's gradient."""
        values = self._engine.forward(*inputs)
        loss, sums = losses.value_loss(values, old_values, returns, self._config.value_clip, num_trained)
        self._engine.backward(loss)
        for name, (total, count) in sums.items():
            tally.add(name, total, count)
        # The loss is this row's summand of a mean over the step; the tally wants the sum over its tokens.
        tally.add("value_loss", loss.item() * num_trained, len(values))

    def _batches(self, samples: list[TurnSample]) -> list[Batch]:
        """This rank's work on `samples`. Kept until the update, since `values` is asked for the same samples
        before it."""
        # Compared by content: each call over Ray brings copies of its own.
        if not self._latest[1] or self._latest[0] != samples:
            group_ids = [sample.group_id for sample in samples]
            steps = split_updates(group_ids, self._settings.updates_per_iteration)
            self._latest = (samples, [self._batch(samples, indices) for indices in steps])
        return self._latest[1]

    def _batch(self, samples: list[TurnSample], indices: list[int]) -> Batch:
        """This rank's work of the optimizer step on the samples at `indices`."""
        rows = self._rows(samples, indices)
        return Batch(
            num_trained=sum(samples[index].num_trained for index in indices),
            rows=rows,
            inputs=[self._inputs(row) for row in rows],
        )

    def _inputs(self, row: PackedRow) -> tuple[object, ...]:
        if self._frozen_backbone is None:
            return row.token_ids, row.position_ids, row.spans, row.logit_index
        # Computed here once an iteration: they are the same in every epoch.
        return (frozen_features(self._frozen_backbone, row),)


def _fit(values: Columns, returns: Columns) -> list[Metric]:
    """How the values that an update started from fit the returns, over all trained tokens of all ranks;
    nothing for no token.

    Explained variance is 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is what a constant does.
    Equal returns leave nothing to explain.
    """
    if not values:
        return []
    predicted = torch.cat(list(values)).double()
    target = torch.cat(list(returns)).double()
    variance = float(target.var(correction=0))
    unexplained = float((target - predicted).var(correction=0))
    # Every rank has all columns and reports the same mean; a weight of 0 leaves it out where it says nothing.
    explained = 1 - unexplained / variance if variance else 0.0
    return [
        Metric("critic/value_mean", float(predicted.mean()), Reduction.last),
        Metric("critic/return_mean", float(target.mean()), Reduction.last),
        Metric("critic/explained_variance", explained, Reduction.mean, float(variance > 0)),
    ]
