"""Cost of 1,000 dialogues, by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.hosted_cost import measure, report
from rlver_dist.chat_client.budget import Prices
from rlver_dist.errors import DataError


def write(folder: Path, *tokens: tuple[float, float, float]) -> Path:
    names = [f"simulator/chat_{kind}_tokens" for kind in ("prompt", "cached", "completion")]
    rows = [
        {"iteration": n, "rollout/dialogues": 50.0, **dict(zip(names, row, strict=True))}
        for n, row in enumerate(tokens, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_tokens_and_money_per_thousand_dialogues(tmp_path: Path) -> None:
    # The first iteration counts the evaluation too and stays out: 100 dialogues with 400,000 prompt tokens,
    # half of them cached.
    measured = measure(write(tmp_path, (9e9, 0, 9e9), (150_000, 80_000, 6_000), (250_000, 120_000, 14_000)))
    assert (measured.iterations, measured.dialogues) == ((2, 3), 100)
    lines = report(measured, Prices(prompt=2.0, cached=0.5, completion=8.0)).splitlines()
    cells = {line[:22].strip(): line[22:].split() for line in lines[2:]}
    assert cells == {
        "prompt, not cached": ["2000000", "4.0000"],
        "prompt, cached": ["2000000", "1.0000"],
        "completion": ["200000", "1.6000"],
        "all": ["4200000", "6.6000"],
    }


def test_judges_of_other_models_cost_too(tmp_path: Path) -> None:
    rows = [
        {"iteration": n, "rollout/dialogues": 10.0, "simulator/chat_prompt_tokens": 100.0} for n in (1, 2)
    ]
    rows[1] |= {
        "simulator/judge_2_chat_prompt_tokens": 50.0,
        "simulator/judge_3_chat_prompt_tokens": 7.0,
        "simulator/chat_lost_tokens": 3.0,
    }
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    measured = measure(tmp_path)
    assert (measured.tokens["prompt"], measured.lost_tokens) == (157.0, 3.0)


def test_runs_that_cannot_tell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two iterations or more"):
        measure(write(tmp_path, (1, 0, 1)))
    with pytest.raises(DataError, match="simulator=openai or simulator=vllm"):
        measure(write(tmp_path, (0, 0, 0), (0, 0, 0)))
