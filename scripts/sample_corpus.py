"""Prints replies of the corpus (docs/replies.md) at random, with their talk and grade.

python -m scripts.sample_corpus [--split train] [--number 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "rlver_dist" / "data" / "replies"


def load_corpus(split: str) -> list[dict]:
    """Rows of one split, `train` or `test`; docs/replies.md has their fields."""
    with (CORPUS / f"{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print replies of the corpus at random.")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = load_corpus(arguments.split)
    for row in random.Random(arguments.seed).sample(rows, min(arguments.number, len(rows))):
        print(f"== {row['id']}  ({row['temperament']}, {row['intent']}: {row['want']})")
        for message in row["messages"]:
            print(f"{message['role']:>9}  {message['text']}")
        print(f"{'thought':>9}  {row['thought']}")
        for reply in row["replies"]:
            print(f"{reply['grade']:>9}  [{reply['kind']}] {reply['text']}")


if __name__ == "__main__":
    main()
