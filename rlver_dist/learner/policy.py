"""`PolicyLearner`: one rank of the policy's data-parallel training.

A plain class, wrapped as an actor in `cluster/`, one a process (DeepSpeed and transformers keep process-wide
state). Every method but `metadata` and `weight_bytes` is collective: the driver calls it on all ranks with
equal arguments. Each rank takes its rows of the samples by the same deterministic plan, so nothing but
gradients, metrics and numbers of single tokens ever travels.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from rlver_dist.algorithms import kl, losses
from rlver_dist.config.enums import KLPlacement
from rlver_dist.config.learner import LearnerConfig, WarmUpConfig
from rlver_dist.experience.balance import split_updates
from rlver_dist.experience.packing import Columns, PackedRow, Span, column, require_columns
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.learner import checkpoint, engine, weights
from rlver_dist.learner.imitation import distilled, imitation_measure, plan_steps
from rlver_dist.learner.nccl import TransferTargets, WeightBroadcast
from rlver_dist.learner.policy_models import PolicyModels, PolicySettings, Weights
from rlver_dist.learner.rank import LearnerRank, RankPlace
from rlver_dist.learner.rows import (
    Forward,
    collect_columns,
    measure_row,
    num_tokens,
    score_row,
)
from rlver_dist.learner.scoring import PolicyModel
from rlver_dist.learner.tally import Tally
from rlver_dist.tracking.metrics import Metric, Reduction

RATE_TOKENS = 512
"""Tokens of the row that `score_rate` times three times: 6 s on two slow cores."""


class PolicyLearner(LearnerRank):
    """Owns the policy's weights: updates, scores, sends, saves and exports them."""

    def __init__(self, settings: PolicySettings, place: RankPlace) -> None:
        super().__init__(settings.learner, place)
        self._algorithm = settings.algorithm
        self._temperature = settings.temperature
        self._models = PolicyModels(settings, place)
        self._reference: PolicyModel | None = None
        self._reference_is_base = False
        self._broadcast: WeightBroadcast | None = None

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group, load the policy (and the reference for a KL term), build the engine.

        Args:
            master_address: host of rank 0.
            master_port: free TCP port there.

        Raises:
            ConfigError: the model cannot be trained exactly, or has no layers of the adapters' names.
        """
        self._join(master_address, master_port)
        self._running = self._models.engine(self._options)
        if self._algorithm.kl_coef > 0:
            self._reference = self._models.frozen(self._models.start_path)
            self._reference_is_base = self._models.start_path == self._models.base_path

    def _base(self) -> PolicyModel:
        """The base model, frozen: the reference where that is it, else loaded for the caller alone."""
        if self._reference is not None and self._reference_is_base:
            return self._reference
        return self._models.frozen(self._models.base_path)

    def update(self, samples: list[TurnSample], advantages: Columns, kl_coef: float) -> list[Metric]:
        """Train on one iteration's samples, in `algorithm.updates_per_iteration` optimizer steps along whole
        groups.

        Args:
            samples: all samples of the iteration, on every rank, in one order.
            advantages: `[n_i]` for each sample, over its trained tokens.
            kl_coef: weight of the KL term where it is part of the loss.

        Returns:
            This rank's metrics; means are weighted by this rank's trained tokens.

        Raises:
            RlverError: too many gradients in a row, or weights, are not finite.
            ValueError: advantages do not fit the samples.
        """
        started = time.perf_counter()
        require_columns(samples, advantages=advantages)
        rollout = [sample.trained_logprobs() for sample in samples]
        tally = Tally()
        skipped = 0
        group_ids = [sample.group_id for sample in samples]
        steps = split_updates(group_ids, self._algorithm.updates_per_iteration)
        rows_by_step = [self._rows(samples, indices) for indices in steps]
        with self._counting(self._update_tokens(rows_by_step)):
            # PPO's ratio is to the weights that the update starts from, so all later steps' old log-probs
            # are computed before the first one. That one starts from the old weights itself: its own forward
            # pass gives its old log-probs.
            old: list[list[Tensor | None]] = [
                [None if step == 0 else self._logprobs(self._engine.forward, row) for row in rows]
                for step, rows in enumerate(rows_by_step)
            ]
            for indices, rows, old_logprobs in zip(steps, rows_by_step, old, strict=True):
                num_trained = sum(samples[index].num_trained for index in indices)
                of_step = Tally()
                for row, row_old in zip(rows, old_logprobs, strict=True):
                    columns = (column(advantages, row), column(rollout, row), row_old)
                    self._accumulate(row, *columns, kl_coef, num_trained, of_step)
                of_step.add("lr", self._engine.lr, 1)
                skipped += not self._step(of_step, tally)
        self._engine.require_finite_weights()
        engine.return_freed_memory()
        elapsed = time.perf_counter() - started
        # Rows without samples only keep this rank in step with the others.
        own = [row for rows in rows_by_step for row in rows if row.indices]
        trained = sum(len(row.target_index) for row in own)
        return [
            *tally.metrics("learner/"),
            Metric("learner/trained_tokens", trained, Reduction.sum),
            Metric("learner/optimizer_steps", len(steps), Reduction.max),
            Metric("learner/skipped_steps", skipped, Reduction.max),
            Metric("perf/learner_tokens_per_s", num_tokens(own) / elapsed, Reduction.sum),
            Metric("time/policy_update_s", elapsed, Reduction.max),
        ]

    def _update_tokens(self, rows_by_step: list[list[PackedRow]]) -> int:
        """Tokens that an update computes: each row once, once more before it where it is not of the first
        step, and by the reference."""
        passes = [*rows_by_step, *rows_by_step[1:], *(rows_by_step if self._kl_in_loss else ())]
        return num_tokens([row for rows in passes for row in rows])

    @property
    def _kl_in_loss(self) -> bool:
        return self._reference is not None and self._algorithm.kl_placement is KLPlacement.loss

    @torch.no_grad()
    def _logprobs(self, forward: Forward, row: PackedRow, temperature: float | None = None) -> Tensor:
        """Log-probs `[S]` of the trained tokens, by default at the sampling temperature; `forward` is the
        engine's, or a model."""
        logprobs, _ = score_row(forward, row, self._temperature if temperature is None else temperature)
        self._done += len(row.token_ids)
        return logprobs

    def _accumulate(
        self,
        row: PackedRow,
        advantages: Tensor,
        rollout_logprobs: Tensor,
        old_logprobs: Tensor | None,
        kl_coef: float,
        num_trained: int,
        tally: Tally,
    ) -> None:
        """Add one row's gradient; `num_trained` counts the trained tokens of the whole update over all
        ranks."""
        algorithm = self._algorithm
        count = len(row.target_index)
        logprobs, entropies = score_row(self._engine.forward, row, self._temperature)
        if old_logprobs is None:
            old_logprobs = logprobs.detach()
        tis_weights = losses.truncated_importance_weights(old_logprobs, rollout_logprobs, algorithm.tis_cap)
        policy_loss, sums = losses.policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            tis_weights,
            algorithm.clip_low,
            algorithm.clip_high,
            num_trained,
        )
        loss = policy_loss - algorithm.entropy_coef * entropies.sum() / num_trained
        if self._reference is not None and self._kl_in_loss:
            # Row by row, next to the policy's own pass: no column of them has to be kept.
            ref_logprobs = self._logprobs(self._reference, row)
            kl_loss = losses.kl_loss(logprobs, ref_logprobs, algorithm.kl_estimator.value, num_trained)
            loss = loss + kl_coef * kl_loss
            tally.add("kl_ref", kl_loss.item() * num_trained, count)
        self._engine.backward(loss)
        self._done += len(row.token_ids)
        for name, (total, elements) in sums.items():
            tally.add(name, total, elements)
        # Losses are this row's summands of means over the update; the tally wants sums over its tokens.
        tally.add("loss", loss.item() * num_trained, count)
        tally.add("policy_loss", policy_loss.item() * num_trained, count)
        tally.add("entropy", entropies.sum().item(), count)
        tally.add("logprob_gap", (old_logprobs - rollout_logprobs).abs().sum().item(), count)

    def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """The KL(policy || reference) estimate of each trained token; the same on every rank.

        Args:
            samples: on every rank, in one order.

        Returns:
            `[n_i]` float32 for each sample, in nats.

        Raises:
            ValueError: there is no reference, since `algorithm.kl_coef` is 0.
        """
        if self._reference is None:
            raise ValueError("kl_tokens: no reference model is loaded where algorithm.kl_coef is 0")
        rows = self._rows(samples, range(len(samples)))
        estimates = []
        with self._counting(2 * num_tokens(rows)):
            for row in rows:
                logprobs = self._logprobs(self._engine.forward, row)
                ref_logprobs = self._logprobs(self._reference, row)
                estimates.append(kl.estimate(logprobs, ref_logprobs, self._algorithm.kl_estimator.value))
        return collect_columns(samples, rows, estimates, self._device)

    def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all sampled tokens under `model.path`, before any warm-up, and their
        number; the same on every rank.

        At temperature 1, in nats; exp(nll / tokens) is the base model's perplexity. Where the reference is
        another model, or there is none, the base model is loaded for this call alone.
        """
        base = self._base()
        # In float64: tens of thousands of log-probs are summed up.
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        rows = self._rows(samples, range(len(samples)))
        with self._counting(num_tokens(rows)):
            for row in rows:
                sums[0] -= self._logprobs(base, row, temperature=1.0).double().sum()
                sums[1] += len(row.target_index)
        torch.distributed.all_reduce(sums)
        return sums[0].item(), int(sums[1])

    def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up: say the samples' thoughts in their format, and reply behind them as
        `model.path` does without.

        Lowers the mean over the samples' trained tokens of what `imitation.py` defines, at the sampling
        temperature, with an AdamW of its own whose rate falls from `config.lr` to 0. Afterwards the learner
        is as one that was built on the resulting weights: a fresh optimizer and schedule, and these weights
        as the KL reference.

        Args:
            samples: what to imitate, on every rank, in one order; one or more.
            config: epochs, batch size in samples, and learning rate.
            seed: shuffles the dialogues.

        Returns:
            This rank's metrics: the losses of the first and the last step, nats a token, and the number of
                steps.
        """
        steps = plan_steps(
            [one.sample.dialogue_id for one in samples],
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=seed,
        )
        supervised = dataclasses.replace(self._options, lr=config.lr, warmup_steps=0)
        self._rebuild(supervised, decay_steps=len(steps))
        # Where it is loaded for this stage alone, it is freed before the next engine is made.
        teacher = self._base()
        with self._counting(math.ceil(config.epochs * len(samples) / self._world_size)):
            metrics = [self._imitate_step(teacher, samples, indices) for indices in steps]
        del teacher
        merged = self._rebuild(self._options)
        if self._reference is not None:
            self._reference = self._models.frozen(self._models.start_path, merged)
            self._reference_is_base = False
        engine.return_freed_memory()
        reached = [
            dataclasses.replace(metric, key=f"{metric.key}_{end}")
            for end, of_step in (("first", metrics[0]), ("last", metrics[-1]))
            for metric in of_step
        ]
        return [*reached, Metric("warm_up/steps", len(steps), Reduction.max)]

    def _imitate_step(
        self, teacher: PolicyModel, samples: list[ImitationSample], indices: list[int]
    ) -> list[Metric]:
        """One optimizer step on the samples at `indices`; returns the means of this rank's losses."""
        num_trained = sum(samples[index].sample.num_trained for index in indices)
        tally = Tally()
        for row in self._rows([one.sample for one in samples], indices):
            reply = distilled(row, samples)
            measure = imitation_measure(teacher, row, samples, reply)
            costs = measure_row(self._engine.forward, row, self._temperature, measure)
            self._engine.backward(costs.sum() / num_trained)
            self._done += len(row.indices)
            for name, chosen in (("format_nll", costs[~reply]), ("reply_kl", costs[reply])):
                tally.add(name, chosen.sum().item(), len(chosen))
        self._engine.step()
        return tally.metrics("warm_up/")

    def _rebuild(self, config: LearnerConfig, decay_steps: int | None = None) -> Weights:
        """Replace the engine by a fresh one around its weights, which are returned, on the CPU."""
        current = {name: tensor.cpu().clone() for name, tensor in self.iter_full_tensors()}
        # The old engine goes first, so that two optimizers never stand side by side. It refers to itself in
        # cycles, which only the collector frees.
        self._engine.free()
        self._running = None
        gc.collect()
        self._running = self._models.engine(config, current, decay_steps)
        return current

    @torch.no_grad()
    def probe(self, token_ids: list[int]) -> list[float]:
        """Log-prob in nats, at temperature 1, of each token but the first given those before it; one fewer
        than `token_ids`."""
        tokens = torch.tensor(token_ids, device=self._device)
        positions = torch.arange(len(token_ids), device=self._device)
        logprobs, _ = self._engine.forward(
            tokens, positions, [Span(length=len(token_ids))], positions[:-1], positions[1:], 1.0
        )
        return logprobs.tolist()

    @torch.no_grad()
    def score_rate(self) -> float:
        """Tokens a second of a forward pass over one row, half of whose tokens are scored, over all ranks;
        collective."""
        tokens = torch.ones(RATE_TOKENS, dtype=torch.int64, device=self._device)
        positions = torch.arange(RATE_TOKENS, device=self._device)
        scored = positions[RATE_TOKENS // 2 :]
        seconds = []
        # The first pass allocates, and whatever else just started may take a core from the second.
        for _ in range(3):
            started = time.perf_counter()
            logprobs, _ = self._engine.forward(
                tokens, positions, [Span(length=RATE_TOKENS)], scored - 1, scored, 1.0
            )
            # Reading the numbers waits for a GPU to have computed them.
            logprobs.tolist()
            seconds.append(time.perf_counter() - started)
        return self._world_size * RATE_TOKENS / min(seconds)

    def metadata(self) -> weights.Metadata:
        """Name, dtype and shape of every tensor of `iter_full_tensors`, in its order."""
        return weights.metadata(self._engine)

    def weight_bytes(self) -> int:
        """Bytes of all weights, as `write_weights` writes them."""
        return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.metadata())

    def iter_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole and merged, under its Hugging Face name, tied head included; on the learner's
        device, in the model's dtype."""
        return weights.iter_full_tensors(self._engine)

    def write_weights(self, path: str) -> None:
        """Write all weights as one safetensors file for the rollout engines."""
        checkpoint.write_weights(self._engine, path, self._rank)

    def connect_engines(self, engines: TransferTargets, address: str, port: int) -> None:
        """Form the NCCL transfer group of rank 0, at its address and a free port there, and all workers of
        `engines`; GPUs only."""
        self._broadcast = WeightBroadcast(
            rank=self._rank,
            address=address,
            port=port,
            engines=engines,
            metadata=self.metadata(),
            gather=self.iter_full_tensors,
        )

    def send_weights(self, version: int) -> None:
        """Broadcast all weights to the connected engines, labelled `version`."""
        assert self._broadcast is not None, "connect_engines() comes first"
        self._broadcast.send(version)

    def export(self, directory: str) -> None:
        """Write a Hugging Face folder with tokenizer and chat template."""
        checkpoint.export(self._engine, self._models.start_path, directory, self._rank)
