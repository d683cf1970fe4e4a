"""The loss of the supervised warm-up: tokens to say, and a model to say the rest like.

The think format (tags and thought) is imitated token by token. Of the reply behind it the whole distribution
is: that of the base model, at the same reply after the prompt without thinking (context distillation,
arXiv:2112.00861). Imitating sampled replies instead would sharpen the model around them, and it would say
less, and worse, than it could.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlver_dist.experience.packing import PackedRow, pack
from rlver_dist.experience.prefixes import make_units
from rlver_dist.experience.samples import ImitationSample
from rlver_dist.learner.scoring import ROWS_AT_ONCE, LogprobAndEntropy, Measure, PolicyModel


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
            ours, theirs = (
                torch.log_softmax(part[rows].float() / temperature, dim=-1) for part in (logits, teacher)
            )
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
            ours, theirs = (
                torch.softmax(part[rows].float() / ctx.temperature, dim=-1) for part in (logits, teacher)
            )
            grad_logits[rows] = ours.sub_(theirs).mul_(grad[rows, None] / ctx.temperature)
        return grad_logits, None, None


def distilled(row: PackedRow, samples: Sequence[ImitationSample]) -> Tensor:
    """`[S]` bool: which of the row's trained tokens are of a reply, and so have a distribution to follow."""
    mask: list[bool] = []
    for one in (samples[index] for index in row.indices):
        mask += [False] * (one.sample.num_trained - one.plain.num_trained) + [True] * one.plain.num_trained
    return torch.tensor(mask, dtype=torch.bool, device=row.token_ids.device)


def imitation_measure(
    teacher: PolicyModel, row: PackedRow, samples: Sequence[ImitationSample], reply: Tensor
) -> Measure:
    """What a row costs: for each trained token a loss in nats, as `[S]` float32.

    Args:
        teacher: the base model.
        row: a row of the `sample`s of `samples`.
        samples: all samples that `row.indices` counts in.
        reply: `distilled` of the row.
    """
    plain = [samples[index].plain for index in row.indices]
    asked = pack(
        plain,
        make_units(
            plain,
            range(len(plain)),
            share_prefixes=True,
            max_tokens=sum(len(one.token_ids) for one in plain),
        ),
    )
    with torch.no_grad():
        said = teacher.logits(asked.to(row.token_ids.device))
    # Sharing histories may change the samples' places.
    by_sample = dict(
        zip(asked.indices, said.split([plain[place].num_trained for place in asked.indices]), strict=True)
    )
    in_order = torch.cat([by_sample[place] for place in range(len(plain))]) if plain else said
    return partial(_losses, teacher=in_order, reply=reply)


def _losses(logits: Tensor, targets: Tensor, temperature: float, *, teacher: Tensor, reply: Tensor) -> Any:
    logprobs, _ = LogprobAndEntropy.apply(logits[~reply], targets[~reply], temperature)
    divergences = DivergenceFrom.apply(logits[reply], teacher, temperature)
    losses = torch.zeros(len(targets), dtype=torch.float32, device=logits.device)
    return losses.masked_scatter(~reply, -logprobs).masked_scatter(reply, divergences)
