"""`PolicyLearner`: one rank of the policy's data-parallel training.

A plain class, wrapped as an actor in `cluster/`, one a process (DeepSpeed and transformers keep process-wide state). Every method
but `metadata` is collective: the driver calls it on all ranks with equal arguments. Each rank takes its share of the samples by
the same deterministic plan, so nothing but gradients and metrics ever travels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlver_dist.algorithms import kl, losses
from rlver_dist.choices import KLPlacement
from rlver_dist.config import RunConfig
from rlver_dist.experience.balance import plan_micro_batches, split_updates
from rlver_dist.experience.packing import PackedRow, pack
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner import checkpoint, engine, weights
from rlver_dist.learner.scoring import PolicyModel, load_model
from rlver_dist.learner.tally import Tally
from rlver_dist.models import resolve
from rlver_dist.tracking.metrics import Metric, Reduction


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """One packed row and what the update needs to know of its trained tokens.

    Attributes:
        indices: which samples the row holds, in its order; empty for a row that only keeps this rank in step.
        row: the packed samples, on the learner's device.
        scored: `[S]` positions of the trained tokens in the row.
        old_logprobs: `[S]` their log-probs under the weights that the update starts from; None where the update's own forward
            pass gives them.
    """

    indices: list[int]
    row: PackedRow
    scored: torch.Tensor
    old_logprobs: torch.Tensor | None = None


class PolicyLearner:
    """Owns the policy's weights: updates, scores, sends, saves and exports them."""

    def __init__(
        self,
        *,
        config: RunConfig,
        rank: int,
        world_size: int,
        master_address: str,
        master_port: int,
        device: Literal["cpu", "gpu"],
        num_threads: int,
    ) -> None:
        """Join the process group, load the policy (and the reference, where a KL term is on) and build the engine.

        Args:
            config: the run's configuration.
            rank: 0 to world_size - 1.
            world_size: learner processes.
            master_address: host of rank 0.
            master_port: free TCP port there.
            device: what to compute on.
            num_threads: compute threads on a CPU; 0 leaves torch's choice.
        """
        self._algorithm = config.algorithm
        self._rank, self._world_size = rank, world_size
        self._temperature = config.rollout.temperature
        self._max_tokens = config.learner.micro_batch_tokens
        self._path = resolve(config.model.path)
        self._device = engine.start_rank(
            rank=rank, world_size=world_size, master_address=master_address, master_port=master_port, device=device, num_threads=num_threads
        )
        self._dtype = getattr(torch, config.model.dtype.value)
        settings = engine.deepspeed_config(config.learner, config.model.dtype)
        with engine.sharded_construction(settings):
            model = PolicyModel(load_model(self._path, self._dtype), recompute=config.learner.gradient_checkpointing)
        self._engine = engine.TrainingEngine(model, config=config.learner, settings=settings, world_size=world_size)
        self._reference = self._load_base() if config.algorithm.kl_coef > 0 else None

    def _load_base(self) -> PolicyModel:
        """A whole, frozen replica of the model that training started from."""
        base = PolicyModel(load_model(self._path, self._dtype), recompute=False)
        return base.requires_grad_(False).eval().to(self._device)

    def update(self, samples: list[TurnSample], advantages: list[float]) -> list[Metric]:
        """Train on one iteration's samples, in `algorithm.updates_per_iteration` optimizer steps along whole groups.

        Args:
            samples: all samples of the iteration, on every rank, in one order.
            advantages: one for each sample.

        Returns:
            This rank's metrics; means are weighted by this rank's trained tokens.

        Raises:
            RlverError: the gradient is not finite.
            ValueError: advantages do not fit the samples.
        """
        started = time.perf_counter()
        tally = Tally()
        parts = split_updates([sample.group_id for sample in samples], self._algorithm.updates_per_iteration)
        updates = [self._share(samples, advantages, part) for part in parts]
        # The first step starts from the old weights, so its own forward pass gives its old log-probs.
        for batch in (batch for update in updates[1:] for batch in update):
            batch.old_logprobs = self._score(self._engine.forward, batch, self._temperature)
        for part, update in zip(parts, updates, strict=True):
            num_trained = sum(sum(samples[index].loss_mask) for index in part)
            for batch in update:
                self._accumulate(batch, num_trained, tally)
            tally.add("lr", self._engine.lr, 1)
            tally.add("grad_norm", self._engine.step(), 1)
        engine.return_freed_memory()
        tokens = sum(len(batch.row.token_ids) for update in updates for batch in update if batch.indices)
        return [
            *tally.metrics("learner/"),
            Metric("learner/trained_tokens", sum(len(batch.scored) for update in updates for batch in update), Reduction.sum),
            Metric("learner/optimizer_steps", len(parts), Reduction.max),
            Metric("perf/learner_tokens_per_s", tokens / (time.perf_counter() - started), Reduction.sum),
        ]

    def _share(self, samples: list[TurnSample], advantages: list[float], part: list[int]) -> list[MicroBatch]:
        """This rank's micro-batches of the samples at `part`; as many on every rank."""
        plan = plan_micro_batches([len(samples[index].token_ids) for index in part], self._world_size, self._max_tokens)
        batches = []
        for chosen in plan[self._rank]:
            indices = [part[position] for position in chosen]
            row = pack(samples, advantages, indices).to(self._device)
            batches.append(MicroBatch(indices=indices, row=row, scored=row.loss_mask.nonzero().squeeze(1)))
        return batches

    @torch.no_grad()
    def _score(self, forward: Callable[..., Any], batch: MicroBatch, temperature: float) -> torch.Tensor:
        """Log-probs `[S]` of the trained tokens; `forward` is the engine's, or a model."""
        row = batch.row
        return forward(row.token_ids, row.position_ids, row.lengths, batch.scored, temperature)[0]

    def _accumulate(self, batch: MicroBatch, num_trained: int, tally: Tally) -> None:
        """Add one micro-batch's gradient; `num_trained` counts the trained tokens of the whole update over all ranks."""
        algorithm, row, scored = self._algorithm, batch.row, batch.scored
        logprobs, entropies = self._engine.forward(row.token_ids, row.position_ids, row.lengths, scored, self._temperature)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        rollout_logprobs, trained = row.rollout_logprobs[scored], row.loss_mask[scored]
        tis_weights = losses.truncated_importance_weights(old_logprobs, rollout_logprobs, trained, algorithm.tis_cap)
        policy_loss, sums = losses.policy_loss(
            logprobs, old_logprobs, row.advantages[scored], tis_weights, algorithm.clip_low, algorithm.clip_high, num_trained
        )
        loss = policy_loss - algorithm.entropy_coef * entropies.sum() / num_trained
        if self._reference is not None and algorithm.kl_placement is KLPlacement.loss:
            ref_logprobs = self._score(self._reference, batch, self._temperature)
            kl_loss = losses.kl_loss(logprobs, ref_logprobs, trained, algorithm.kl_estimator.value, num_trained)
            loss = loss + algorithm.kl_coef * kl_loss
            tally.add("kl_ref", kl_loss.item() * num_trained, len(scored))
        self._engine.backward(loss)
        for name, (total, count) in sums.items():
            tally.add(name, total, count)
        tally.add("loss", loss.item() * num_trained, len(scored))
        tally.add("policy_loss", policy_loss.item() * num_trained, len(scored))
        tally.add("entropy", entropies.sum().item(), len(scored))
        tally.add("logprob_gap", (old_logprobs - rollout_logprobs).abs().sum().item(), len(scored))

    def kl_sums(self, samples: list[TurnSample]) -> list[float]:
        """Sum of the per-token KL(policy || reference) estimates over each sample's trained tokens, nats; the same on every rank.

        Raises:
            ValueError: there is no reference, since `algorithm.kl_coef` is 0.
        """
        if self._reference is None:
            raise ValueError("kl_sums: no reference model is loaded where algorithm.kl_coef is 0")
        sums = torch.zeros(len(samples), dtype=torch.float64, device=self._device)
        for batch in self._share(samples, [0.0] * len(samples), list(range(len(samples)))):
            logprobs, ref_logprobs = (self._score(model, batch, self._temperature) for model in (self._engine.forward, self._reference))
            estimates = kl.estimate(logprobs, ref_logprobs, self._algorithm.kl_estimator.value)
            if batch.indices:
                lengths = torch.tensor(batch.row.lengths, device=self._device)
                owner = torch.tensor(batch.indices, device=self._device).repeat_interleave(lengths)[batch.scored]
                sums.index_add_(0, owner, estimates.double())
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all sampled tokens under the model that training started from, and their number.

        At temperature 1, in nats; exp(nll / tokens) is the base model's perplexity. The same on every rank. Without a reference
        the base model is loaded for this call alone.
        """
        base = self._reference or self._load_base()
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for batch in self._share(samples, [0.0] * len(samples), list(range(len(samples)))):
            sums[0] -= self._score(base, batch, 1.0).double().sum()
            sums[1] += len(batch.scored)
        torch.distributed.all_reduce(sums)
        return sums[0].item(), int(sums[1])

    @torch.no_grad()
    def probe(self, token_ids: list[int]) -> list[float]:
        """Log-prob in nats, at temperature 1, of each token but the first given those before it; one fewer than `token_ids`."""
        tokens = torch.tensor(token_ids, device=self._device)
        positions = torch.arange(len(token_ids), device=self._device)
        logprobs, _ = self._engine.forward(tokens, positions, [len(token_ids)], positions[1:], 1.0)
        return logprobs.tolist()

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor of `iter_full_tensors`, in its order."""
        return weights.metadata(self._engine)

    def iter_full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, under its Hugging Face name, tied head included; see `weights.iter_full_tensors`."""
        return weights.iter_full_tensors(self._engine)

    def write_weights(self, path: str) -> None:
        """Write all weights as one safetensors file for the rollout engines."""
        checkpoint.write_weights(self._engine, path, self._rank)

    def save(self, directory: str) -> None:
        """Write the state that `load` needs to go on: model, optimizer, schedule and step counter."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote, with the same number of ranks."""
        self._engine.load(directory)

    def export(self, directory: str) -> None:
        """Write a Hugging Face folder with tokenizer and chat template."""
        checkpoint.export(self._engine, self._path, directory, self._rank)

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self._engine.close()
