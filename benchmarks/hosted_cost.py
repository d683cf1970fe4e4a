"""What 1,000 dialogues with LLM users cost, from the tokens that a run measured and the prices of an
endpoint.

    python -m benchmarks.hosted_cost runs/mine --prompt 0.40 --cached 0.10 --completion 1.60

Prices are money per million tokens, as the endpoint's price list has them today; there are none in here. The
run may have had its users in own vLLM engines: its tokens are then those of that model's tokenizer, an
estimate for another model. The reference is a prompt without a cache: cached tokens stand apart, so that
their share of the tokens and of the money can be read off.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlver_dist.chat_client.budget import Prices
from rlver_dist.errors import EXIT_REFUSED, DataError, UserError
from rlver_dist.tracking.jsonl import read_metrics

KINDS = ("prompt", "cached", "completion")
SCALE = 1000


@dataclass(kw_only=True, slots=True, frozen=True)
class Measured:
    """Tokens of the users' calls in some iterations.

    Attributes:
        iterations: first and last.
        dialogues: held in them.
        tokens: by kind; cached ones are part of the prompt's.
        lost_tokens: estimate for attempts that never said what they used.
    """

    iterations: tuple[int, int]
    dialogues: float
    tokens: dict[str, float]
    lost_tokens: float


def measure(run: Path) -> Measured:
    """Add up a run's iterations, without the first: its counts also hold the evaluation before training.

    Raises:
        DataError: no metrics, fewer than two iterations, or no calls of a chat model in them.
    """
    path = run / "metrics.jsonl"
    rows = read_metrics(path)[1:]
    if not rows:
        raise DataError(
            f"{path}: needs two iterations or more; the first one also counts the evaluation before training"
        )
    tokens = {kind: _total(rows, f"{kind}_tokens") for kind in KINDS}
    dialogues = sum(row["rollout/dialogues"] for row in rows)
    if tokens["prompt"] <= 0 or dialogues <= 0:
        raise DataError(
            f"{path}: simulator/chat_prompt_tokens: no tokens there; name a run with simulator=openai or "
            f"simulator=vllm"
        )
    lost = _total(rows, "lost_tokens")
    iterations = (int(rows[0]["iteration"]), int(rows[-1]["iteration"]))
    return Measured(iterations=iterations, dialogues=dialogues, tokens=tokens, lost_tokens=lost)


def _total(rows: Sequence[Mapping[str, float]], name: str) -> float:
    """Sum of a count of the users' model and of the models that only judge."""
    key = re.compile(rf"simulator/(judge_\d+_)?chat_{name}")
    return sum(value for row in rows for found, value in row.items() if key.fullmatch(found))


def report(measured: Measured, prices: Prices) -> str:
    """Tokens and money per 1,000 dialogues, as text."""
    per = {kind: SCALE * count / measured.dialogues for kind, count in measured.tokens.items()}
    lost = SCALE * measured.lost_tokens / measured.dialogues
    rows = [
        (
            "prompt, not cached",
            per["prompt"] - per["cached"],
            {"prompt_tokens": per["prompt"] - per["cached"]},
        ),
        ("prompt, cached", per["cached"], {"prompt_tokens": per["cached"], "cached_tokens": per["cached"]}),
        ("completion", per["completion"], {"completion_tokens": per["completion"]}),
    ]
    none = {"prompt_tokens": 0.0, "cached_tokens": 0.0, "completion_tokens": 0.0}
    priced = [(name, count, prices.cost(**(none | part))) for name, count, part in rows]
    total = ("all", per["prompt"] + per["completion"], sum(cost for _, _, cost in priced))
    first, last = measured.iterations
    lines = [f"measured: {measured.dialogues:g} dialogues, iterations {first} to {last}"]
    lines.append(f"{f'per {SCALE} dialogues':<22}{'tokens':>14}{'cost':>12}")
    lines += [f"{name:<22}{count:>14.0f}{cost:>12.4f}" for name, count, cost in (*priced, total)]
    if lost > 0:
        lines.append(f"besides, attempts that never said what they used: up to {lost:.0f} tokens")
    return "\n".join(lines)


def main() -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Cost of 1,000 dialogues with hosted users.")
    parser.add_argument("run", type=Path, help="a run's output_dir")
    parser.add_argument("--prompt", type=float, required=True, help="money per million prompt tokens")
    parser.add_argument("--completion", type=float, required=True, help="money per million sampled tokens")
    parser.add_argument(
        "--cached",
        type=float,
        default=0.0,
        help="money per million cached prompt tokens; 0 takes the prompt's",
    )
    arguments = parser.parse_args()
    try:
        measured = measure(arguments.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    print(
        report(
            measured,
            Prices(prompt=arguments.prompt, cached=arguments.cached, completion=arguments.completion),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
