"""How much faster training on think dialogues is when a dialogue's turns share their history.

    python -m benchmarks.shared_prefix --repeats 3

Forward and backward pass of the small chat model in bfloat16 over one dialogue of random tokens, its turns
laid out with a shared history and as one sample each, in one process, the two taking turns so that a busy
machine slows both. Prints one row a dialogue length; times are medians. `speed-up` is the ratio of the
seconds; the reference is one sample a turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.experience.packing import PackedRow
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner.rows import rank_rows, score_row
from rlver_dist.learner.scoring import PolicyModel, load_model

TURNS = (3, 8)
OPENING_TOKENS, THINKING_TOKENS, REPLY_TOKENS, USER_TOKENS = 120, 40, 40, 40
"""System prompt with the opening, and per turn: thoughts, reply, the user's answer."""


def think_dialogue(num_turns: int, vocabulary: int) -> list[TurnSample]:
    """One sample a turn, over the history without thoughts."""
    draw = random.Random(0)
    history, samples = draw.choices(range(vocabulary), k=OPENING_TOKENS), []
    for turn in range(num_turns):
        thinking, reply = (
            draw.choices(range(vocabulary), k=count) for count in (THINKING_TOKENS, REPLY_TOKENS)
        )
        mask = [False] * len(history) + [True] * (THINKING_TOKENS + REPLY_TOKENS)
        samples.append(
            TurnSample(
                token_ids=[*history, *thinking, *reply],
                loss_mask=mask,
                rollout_logprobs=[0.0] * len(mask),
                dialogue_id="d",
                group_id="g",
                turn_index=turn,
            )
        )
        history = [*history, *reply, *draw.choices(range(vocabulary), k=USER_TOKENS)]
    return samples


def seconds(model: PolicyModel, rows: list[PackedRow]) -> float:
    """One forward and backward pass over `rows`."""
    model.zero_grad()
    started = time.perf_counter()
    for row in rows:
        score_row(model, row, 1.0)[0].sum().backward()
    return time.perf_counter() - started


def main() -> None:
    """Command line: measure and print the table."""
    parser = argparse.ArgumentParser(description="Speed-up of training with shared histories.")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed passes of each layout; the median counts"
    )
    repeats = parser.parse_args().repeats
    model = PolicyModel(load_model(resolve(SMOLLM2), torch.bfloat16), recompute=False).train()
    print(f"{'turns':>5} {'tokens alone':>13} {'shared':>7} {'s alone':>8} {'s shared':>9} {'speed-up':>9}")
    for num_turns in TURNS:
        samples = think_dialogue(num_turns, model.model.config.vocab_size)
        place = dict(rank=0, world_size=1, max_tokens=16384, device="cpu")
        layouts = [
            rank_rows(samples, range(num_turns), share_prefixes=shared, **place) for shared in (False, True)
        ]
        seconds(model, layouts[1])
        times = [[seconds(model, rows) for rows in layouts] for _ in range(repeats)]
        alone, shared = (statistics.median(column) for column in zip(*times, strict=True))
        tokens = [sum(len(row.token_ids) for row in rows) for rows in layouts]
        print(
            f"{num_turns:>5} {tokens[0]:>13} {tokens[1]:>7} {alone:>8.2f} {shared:>9.2f} "
            f"{alone / shared:>8.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
