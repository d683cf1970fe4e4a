"""The supervised warm-up: which samples go into which step, and its loss: tokens to say, and a model to say
the rest like.

The think format (tags and thought) is imitated token by token. Of the reply behind it the whole distribution
is: that of the base model, at the same reply after the prompt without thinking (context distillation,
arXiv:2112.00861). Imitating sampled replies instead would sharpen the model around them, and it would say
less, and worse, than it could.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlver_dist.experience.packing import PackedRow, pack
from rlver_dist.experience.prefixes import make_units
from rlver_dist.experience.samples import ImitationSample
from rlver_dist.learner.scoring import ROWS_AT_ONCE, LogprobAndEntropy, Measure, PolicyModel


def plan_steps(dialogue_ids: Sequence[str], *, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of the samples of each optimizer step of the warm-up, over all epochs.

    Args:
        dialogue_ids: dialogue of each sample, one or more; the samples of one stay together, since they share
            their history.
        batch_size: samples a step, on average; a step takes one dialogue at least.
        epochs: passes over the samples.
        seed: shuffles the dialogues, anew in each epoch.
    """
    by_dialogue: dict[str, list[int]] = {}
    for index, dialogue_id in enumerate(dialogue_ids):
        by_dialogue.setdefault(dialogue_id, []).append(index)
    dialogues = list(by_dialogue.values())
    count = len(dialogues)
    steps_per_epoch = min(math.ceil(len(dialogue_ids) / batch_size), count)
    shuffler = random.Random(seed)
    steps = []
    for _ in range(epochs):
        shuffler.shuffle(dialogues)
        for step in range(steps_per_epoch):
            # The steps' numbers of dialogues differ by at most one.
            chosen = dialogues[step * count // steps_per_epoch : (step + 1) * count // steps_per_epoch]
            steps.append([index for members in chosen for index in members])
    return steps


class DivergenceFrom(torch.autograd.Function):
    """KL(teacher || model) of softmax(logits / temperature), per row, in float32.

    With p the model's probabilities, q the teacher's and z = logits / temperature: d KL / dz = p - q.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """`logits` [K, V] of the model and of the `teacher` -> divergences [K], float32, in nats."""
        divergences = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            ours = torch.log_softmax(logits[rows].float() / temperature, dim=-1)
            theirs = torch.log_softmax(teacher[rows].float() / temperature, dim=-1)
            divergences[rows] = torch.linalg.vecdot(theirs.exp(), theirs - ours)
        ctx.save_for_backward(logits, teacher)
        ctx.temperature = temperature
        return divergences

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gradient with respect to `logits`, in their dtype."""
        logits, teacher = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            ours = torch.softmax(logits[rows].float() / ctx.temperature, dim=-1)
            theirs = torch.softmax(teacher[rows].float() / ctx.temperature, dim=-1)
            grad_logits[rows] = ours.sub_(theirs).mul_(grad[rows, None] / ctx.temperature)
        return grad_logits, None, None


def distilled(row: PackedRow, samples: Sequence[ImitationSample]) -> Tensor:
    """Which of the row's trained tokens are of a reply, and so have a distribution to follow.

    Args:
        row: a row of the `sample`s of `samples`.
        samples: all samples that `row.indices` counts in.

    Returns:
        `[S]` bool, in the order of the row's trained tokens.
    """
    mask: list[bool] = []
    for one in (samples[index] for index in row.indices):
        mask += [False] * (one.sample.num_trained - one.plain.num_trained) + [True] * one.plain.num_trained
    return torch.tensor(mask, dtype=torch.bool, device=row.token_ids.device)


def imitation_measure(
    teacher: PolicyModel, row: PackedRow, samples: Sequence[ImitationSample], reply: Tensor
) -> Measure:
    """What a row costs: the teacher is asked now, the measure compares the model with it.

    Args:
        teacher: the base model.
        row: a row of the `sample`s of `samples`.
        samples: all samples that `row.indices` counts in.
        reply: `[S]` bool, `distilled` of the row.

    Returns:
        A measure of the row's logits: for each trained token a loss in nats, `[S]` float32.
    """
    plain = [samples[index].plain for index in row.indices]
    total = sum(len(sample.token_ids) for sample in plain)
    asked = pack(plain, make_units(plain, range(len(plain)), share_prefixes=True, max_tokens=total))
    with torch.no_grad():
        teacher_logits = teacher.logits(asked.to(row.token_ids.device))
    # Sharing histories may change the samples' places, and the row's trained tokens are in the old order.
    counts = [plain[place].num_trained for place in asked.indices]
    by_sample = dict(zip(asked.indices, teacher_logits.split(counts), strict=True))
    if plain:
        teacher_logits = torch.cat([by_sample[place] for place in range(len(plain))])
    return partial(_losses, teacher=teacher_logits, reply=reply)


def _losses(logits: Tensor, targets: Tensor, temperature: float, *, teacher: Tensor, reply: Tensor) -> Tensor:
    """A `Measure`: `[S]` float32, the cost of each token in nats. `teacher` has the logits `[K, V]` of the K
    tokens where `reply` is True."""
    logprobs, _ = LogprobAndEntropy.apply(logits[~reply], targets[~reply], temperature)
    divergences = DivergenceFrom.apply(logits[reply], teacher, temperature)
    # Gradients flow through masked_scatter, also where the row has tokens of one kind alone, or none.
    losses = torch.zeros(len(targets), dtype=torch.float32, device=logits.device)
    return losses.masked_scatter(~reply, -logprobs).masked_scatter(reply, divergences)
