"""Which frozen backbone and head explain rewards best, and in what time: the choice behind the critic of
`+on=cpu`.

    python -m benchmarks.critic_backbone --run runs/some_run --layers 4 8 15 30 --head-units 0 128 \\
        --lr 1e-3 1e-2 --epochs 4 16

Replays a run's training dialogues in order, as the critic learner would have seen them: at each iteration the
head's values are compared with the rewards before it trains on them, so that every dialogue is explained by
earlier ones alone. gamma and lambda are 1, so a token's return is its dialogue's reward; one optimizer step
an epoch. Prints one line of JSON a choice: explained variance over trained tokens, iteration by iteration and
on average over early ones (the second to the fifth) and the last half, and the seconds of an iteration that
the backbone takes (once) and the head (all epochs).

The reference is a constant value: explained variance is 1 - Var(returns - values) / Var(returns), so 0 is as
good as that and 1 explains every reward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlver_dist.algorithms.losses import value_loss
from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.experience.samples import TurnSample, to_samples
from rlver_dist.learner.rows import rank_rows
from rlver_dist.learner.value_model import ValueHead, frozen_features, load_backbone
from rlver_dist.ledger.parquet import read_records

VALUE_CLIP, GRAD_CLIP, WARMUP_STEPS, ROW_TOKENS, SEED = 0.5, 1.0, 2, 2048, 1
EARLY = slice(1, 5)
"""The second to the fifth iteration: after one of pre-fit."""


@dataclass(kw_only=True, slots=True)
class Iteration:
    """One iteration's trained tokens.

    Attributes:
        features: `[S, H]` float32 of one backbone.
        returns: `[S]` in reward.
        seconds: what the backbone took.
    """

    features: Tensor
    returns: Tensor
    seconds: float


def read_samples(path: Path) -> list[tuple[TurnSample, float]]:
    """Samples of the dialogues of one training iteration that have a reward, each with it."""
    scored = ((record.dialogue, record.reward) for record in read_records(path) if record.reward is not None)
    return [(sample, reward) for dialogue, reward in scored for sample in to_samples(dialogue)]


def featurise(backbone, paid: Sequence[tuple[TurnSample, float]]) -> Iteration:
    """Features before each trained token, in the learner's way."""
    started = time.perf_counter()
    samples, rewards = [sample for sample, _ in paid], [reward for _, reward in paid]
    rows = rank_rows(
        samples,
        range(len(samples)),
        rank=0,
        world_size=1,
        max_tokens=ROW_TOKENS,
        share_prefixes=True,
        device="cpu",
    )
    features = [frozen_features(backbone, row) for row in rows]
    seconds = time.perf_counter() - started
    returns = [
        torch.full((samples[index].num_trained,), rewards[index]) for row in rows for index in row.indices
    ]
    return Iteration(features=torch.cat(features), returns=torch.cat(returns), seconds=seconds)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    return 1 - float((returns - values).var(correction=0) / returns.var(correction=0))


def replay(
    iterations: Sequence[Iteration], head_units: int, lr: float, epochs: int
) -> tuple[list[float], float]:
    """Explained variance at each iteration before training on it, and the head's seconds an iteration."""
    head = ValueHead(iterations[0].features.shape[1], head_units, SEED)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    explained, started = [], time.perf_counter()
    for iteration in iterations:
        old = head(iteration.features).detach()
        explained.append(explained_variance(old, iteration.returns))
        for _ in range(epochs):
            optimizer.zero_grad()
            loss, _ = value_loss(head(iteration.features), old, iteration.returns, VALUE_CLIP, len(old))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), GRAD_CLIP)
            optimizer.step()
            schedule.step()
    return explained, (time.perf_counter() - started) / len(iterations)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="output directory of a run, with dialogues/train_*.parquet"
    )
    parser.add_argument(
        "--model", default=SMOLLM2, help="folder, hub id or bundled name of the backbone's model"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[4, 8, 15, 30], help="numbers of layers to try"
    )
    parser.add_argument(
        "--head-units", type=int, nargs="+", default=[0, 128], help="hidden units to try; 0 is a linear head"
    )
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates to try")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[4, 16], help="passes over an iteration to try"
    )
    options = parser.parse_args()
    samples = [read_samples(path) for path in sorted(options.run.glob("dialogues/train_*.parquet"))]
    for num_layers in options.layers:
        backbone = (
            load_backbone(resolve(options.model), torch.bfloat16, num_layers).requires_grad_(False).eval()
        )
        iterations = [featurise(backbone, part) for part in samples]
        backbone_seconds = sum(iteration.seconds for iteration in iterations) / len(iterations)
        for head_units, lr, epochs in itertools.product(options.head_units, options.lr, options.epochs):
            explained, head_seconds = replay(iterations, head_units, lr, epochs)
            choice = {"num_layers": num_layers, "head_units": head_units, "lr": lr, "epochs": epochs}
            means = {"early": _mean(explained[EARLY]), "last_half": _mean(explained[len(explained) // 2 :])}
            figures = {**means, "backbone_s": backbone_seconds, "head_s": head_seconds}
            rounded = {name: round(figure, 3) for name, figure in figures.items()}
            print(
                json.dumps({**choice, **rounded, "explained": [round(figure, 2) for figure in explained]}),
                flush=True,
            )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
