"""`PolicyLearner`: one rank of the policy's data-parallel training.

A plain class, wrapped as an actor in `cluster/`, one a process (DeepSpeed and transformers keep process-wide
state). Every method but `metadata` is collective: the driver calls it on all ranks with equal arguments. Each
rank takes its share of the samples by the same deterministic plan, so nothing but gradients, metrics and
numbers of single tokens ever travels.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlver_dist.algorithms import kl, losses
from rlver_dist.bundled_models import resolve
from rlver_dist.config.enums import KLPlacement
from rlver_dist.config.learner import LearnerConfig, WarmUpConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.experience.balance import split_updates
from rlver_dist.experience.packing import Columns, PackedRow, Span, column, require_columns
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.learner import checkpoint, engine, weights
from rlver_dist.learner.imitation import distilled, imitation_measure
from rlver_dist.learner.lora import add_adapters
from rlver_dist.learner.rank import LearnerRank
from rlver_dist.learner.rows import collect_columns, num_tokens, score_row
from rlver_dist.learner.scoring import PolicyModel, load_model
from rlver_dist.learner.tally import Tally
from rlver_dist.tracking.metrics import Metric, Reduction

RATE_TOKENS = 512
"""Tokens of the row that `score_rate` times three times: 6 s on two slow cores."""
Weights = dict[str, Tensor]
"""Whole tensors under their Hugging Face names."""


class PolicyLearner(LearnerRank):
    """Owns the policy's weights: updates, scores, sends, saves and exports them."""

    def __init__(self, *, config: RunConfig, model_path: str | None = None, **place: Any) -> None:
        """Join the process group at `place` (see `LearnerRank`), load the policy (and the reference for a KL
        term), build the engine.

        Args:
            config: the run's configuration.
            model_path: folder of a warmed-up policy to start from, which then is the reference too; None
                takes `config.model.path`.
            place: `rank`, `world_size`, `master_address`, `master_port`, `device` and `num_threads`.
        """
        super().__init__(config.learner, **place)
        self._config, self._algorithm = config, config.algorithm
        self._temperature = config.rollout.temperature
        self._base_path = resolve(config.model.path)
        self._path = model_path or self._base_path
        self._dtype = getattr(torch, config.model.dtype.value)
        self._engine = self._build_engine(config.learner)
        self._reference = self._load_frozen(self._path) if config.algorithm.kl_coef > 0 else None
        self._reference_is_base = self._path == self._base_path

    def _build_engine(
        self, config: LearnerConfig, replacement: Weights | None = None, decay_steps: int | None = None
    ) -> engine.TrainingEngine:
        """An engine with a fresh optimizer around the model of the learner's folder, or around `replacement`
        in its place.

        With `decay_steps` its learning rate falls to 0 over so many steps.
        """
        settings = engine.deepspeed_config(config, self._config.model.dtype)
        # Replacements go into a whole model, which DeepSpeed shards afterwards.
        with engine.sharded_construction(settings) if replacement is None else nullcontext():
            model = load_model(self._path, self._dtype)
        if replacement is not None:
            model.load_state_dict(replacement)
        if self._config.model.lora.rank > 0:
            add_adapters(model, self._config.model.lora, self._config.seed)
        policy = PolicyModel(model, recompute=config.gradient_checkpointing)
        return engine.TrainingEngine(
            policy, config=config, settings=settings, world_size=self._world_size, decay_steps=decay_steps
        )

    def _load_frozen(self, path: str, replacement: Weights | None = None) -> PolicyModel:
        """A whole, frozen replica."""
        model = load_model(path, self._dtype)
        if replacement is not None:
            model.load_state_dict(replacement)
        return PolicyModel(model, recompute=False).requires_grad_(False).eval().to(self._device)

    def _base(self) -> PolicyModel:
        """The base model, frozen: the reference where that is it, else loaded for the caller alone."""
        return (
            self._reference
            if self._reference is not None and self._reference_is_base
            else self._load_frozen(self._base_path)
        )

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
            RlverError: the gradient is not finite.
            ValueError: advantages do not fit the samples.
        """
        started = time.perf_counter()
        require_columns(samples, advantages=advantages)
        rollout = [sample.trained_logprobs() for sample in samples]
        tally = Tally()
        parts = split_updates([sample.group_id for sample in samples], self._algorithm.updates_per_iteration)
        updates = [self._share(samples, part) for part in parts]
        # The first step starts from the old weights, so its own forward pass gives its old log-probs.
        with self._counting(self._update_tokens(updates)):
            old: list[list[Tensor | None]] = [
                [None if step == 0 else self._logprobs(self._engine.forward, row) for row in rows]
                for step, rows in enumerate(updates)
            ]
            for part, rows, old_logprobs in zip(parts, updates, old, strict=True):
                num_trained = sum(samples[index].num_trained for index in part)
                for row, row_old in zip(rows, old_logprobs, strict=True):
                    self._accumulate(
                        row,
                        column(advantages, row),
                        column(rollout, row),
                        row_old,
                        kl_coef,
                        num_trained,
                        tally,
                    )
                tally.add("lr", self._engine.lr, 1)
                tally.add("grad_norm", self._engine.step(), 1)
        engine.return_freed_memory()
        elapsed, own = time.perf_counter() - started, [row for rows in updates for row in rows if row.indices]
        return [
            *tally.metrics("learner/"),
            Metric("learner/trained_tokens", sum(len(row.target_index) for row in own), Reduction.sum),
            Metric("learner/optimizer_steps", len(parts), Reduction.max),
            Metric(
                "perf/learner_tokens_per_s", sum(len(row.token_ids) for row in own) / elapsed, Reduction.sum
            ),
            Metric("time/policy_update_s", elapsed, Reduction.max),
        ]

    def _update_tokens(self, updates: list[list[PackedRow]]) -> int:
        """Tokens that an update computes: each row once, once more before it where it is not of the first
        step, and by the reference."""
        passes = [*updates, *updates[1:], *(updates if self._kl_in_loss else ())]
        return num_tokens([row for rows in passes for row in rows])

    @property
    def _kl_in_loss(self) -> bool:
        return self._reference is not None and self._algorithm.kl_placement is KLPlacement.loss

    @torch.no_grad()
    def _logprobs(
        self, forward: Callable[..., Any], row: PackedRow, temperature: float | None = None
    ) -> Tensor:
        """Log-probs `[S]` of the trained tokens, by default at the sampling temperature; `forward` is the
        engine's, or a model."""
        logprobs = score_row(forward, row, self._temperature if temperature is None else temperature)[0]
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
        algorithm, count = self._algorithm, len(row.target_index)
        logprobs, entropies = score_row(self._engine.forward, row, self._temperature)
        old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
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
            ref_logprobs = self._logprobs(self._reference, row)
            kl_loss = losses.kl_loss(logprobs, ref_logprobs, algorithm.kl_estimator.value, num_trained)
            loss = loss + kl_coef * kl_loss
            tally.add("kl_ref", kl_loss.item() * num_trained, count)
        self._engine.backward(loss)
        self._done += len(row.token_ids)
        for name, (total, elements) in sums.items():
            tally.add(name, total, elements)
        tally.add("loss", loss.item() * num_trained, count)
        tally.add("policy_loss", policy_loss.item() * num_trained, count)
        tally.add("entropy", entropies.sum().item(), count)
        tally.add("logprob_gap", (old_logprobs - rollout_logprobs).abs().sum().item(), count)

    def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """`[n_i]` for each sample: the KL(policy || reference) estimate of each trained token, nats; the same
        on every rank.

        Raises:
            ValueError: there is no reference, since `algorithm.kl_coef` is 0.
        """
        if self._reference is None:
            raise ValueError("kl_tokens: no reference model is loaded where algorithm.kl_coef is 0")
        rows, estimates = self._share(samples, range(len(samples))), []
        with self._counting(2 * num_tokens(rows)):
            for row in rows:
                logprobs, ref_logprobs = (
                    self._logprobs(self._engine.forward, row),
                    self._logprobs(self._reference, row),
                )
                estimates.append(kl.estimate(logprobs, ref_logprobs, self._algorithm.kl_estimator.value))
        return collect_columns(samples, rows, estimates, self._device)

    def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all sampled tokens under `config.model.path`, before any warm-up, and
        their number.

        At temperature 1, in nats; exp(nll / tokens) is the base model's perplexity. The same on every rank.
        Where the reference is another model, or there is none, the base model is loaded for this call alone.
        """
        base = self._base()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        rows = self._share(samples, range(len(samples)))
        with self._counting(num_tokens(rows)):
            for row in rows:
                sums[0] -= self._logprobs(base, row, temperature=1.0).double().sum()
                sums[1] += len(row.target_index)
        torch.distributed.all_reduce(sums)
        return sums[0].item(), int(sums[1])

    def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up: say the samples' thoughts in their format, and reply behind them as
        `config.model.path` does without.

        Lowers the mean over the samples' trained tokens of what `imitation.py` defines, at the sampling
        temperature, with an AdamW of its own whose rate falls from `config.lr` to 0. Afterwards the learner
        is as one that was built on the resulting weights: a fresh optimizer and schedule, and these weights
        as the KL reference.

        Args:
            samples: what to imitate, on every rank, in one order; one or more.
            config: epochs, batch size in samples, and learning rate.
            seed: shuffles the dialogues, anew in each epoch; the samples of one stay together, since they
                share their history.

        Returns:
            This rank's metrics: the losses of the first and the last step, nats a token, and the number of
                steps.
        """
        by_dialogue: dict[str, list[int]] = {}
        for index, one in enumerate(samples):
            by_dialogue.setdefault(one.sample.dialogue_id, []).append(index)
        dialogues = list(by_dialogue.values())
        count, num_batches = len(dialogues), min(math.ceil(len(samples) / config.batch_size), len(dialogues))
        self._rebuild(
            dataclasses.replace(self._config.learner, lr=config.lr, warmup_steps=0),
            config.epochs * num_batches,
        )
        teacher, shuffler, steps = self._base(), random.Random(seed), []
        with self._counting(math.ceil(config.epochs * len(samples) / self._world_size)):
            for _ in range(config.epochs):
                shuffler.shuffle(dialogues)
                for number in range(num_batches):
                    chosen = dialogues[number * count // num_batches : (number + 1) * count // num_batches]
                    steps.append(
                        self._imitate_step(
                            teacher, samples, [index for members in chosen for index in members]
                        )
                    )
        del teacher
        merged = self._rebuild(self._config.learner)
        if self._reference is not None:
            self._reference, self._reference_is_base = self._load_frozen(self._path, merged), False
        engine.return_freed_memory()
        ends = (("first", steps[0]), ("last", steps[-1]))
        reached = [
            dataclasses.replace(metric, key=f"{metric.key}_{end}")
            for end, metrics in ends
            for metric in metrics
        ]
        return [*reached, Metric("warm_up/steps", len(steps), Reduction.max)]

    def _imitate_step(
        self, teacher: PolicyModel, samples: list[ImitationSample], part: list[int]
    ) -> list[Metric]:
        """One optimizer step; returns the means of this rank's losses."""
        num_trained, tally = sum(samples[index].sample.num_trained for index in part), Tally()
        for row in self._share([one.sample for one in samples], part):
            reply = distilled(row, samples)
            costs = score_row(
                self._engine.forward, row, self._temperature, imitation_measure(teacher, row, samples, reply)
            )
            self._engine.backward(costs.sum() / num_trained)
            self._done += len(row.indices)
            for name, chosen in (("format_nll", costs[~reply]), ("reply_kl", costs[reply])):
                tally.add(name, chosen.sum().item(), len(chosen))
        self._engine.step()
        return tally.metrics("warm_up/")

    def _rebuild(self, config: LearnerConfig, decay_steps: int | None = None) -> Weights:
        """Replace the engine by a fresh one around its weights, which are returned, on the CPU."""
        current = {name: tensor.cpu().clone() for name, tensor in self.iter_full_tensors()}
        # The old engine goes first, so that two optimizers never stand side by side; its parts refer to one
        # another.
        self._engine.free()
        del self._engine
        gc.collect()
        self._engine = self._build_engine(config, current, decay_steps)
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
        for _ in range(
            3
        ):  # The first pass allocates, and whatever else just started may take a core from the second.
            started = time.perf_counter()
            logprobs, _ = self._engine.forward(
                tokens, positions, [Span(length=RATE_TOKENS)], scored - 1, scored, 1.0
            )
            logprobs.tolist()
            seconds.append(time.perf_counter() - started)
        return self._world_size * RATE_TOKENS / min(seconds)

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor of `iter_full_tensors`, in its order."""
        return weights.metadata(self._engine)

    def iter_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole and merged, under its Hugging Face name, tied head included; see
        `weights.iter_full_tensors`."""
        return weights.iter_full_tensors(self._engine)

    def write_weights(self, path: str) -> None:
        """Write all weights as one safetensors file for the rollout engines."""
        checkpoint.write_weights(self._engine, path, self._rank)

    def export(self, directory: str) -> None:
        """Write a Hugging Face folder with tokenizer and chat template."""
        checkpoint.export(self._engine, self._path, directory, self._rank)
