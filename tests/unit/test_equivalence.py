"""Two runs are equivalent where they sampled and paid the same, and their weights differ no more than those
of one code run twice."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.equivalence import compare, report, with_defaults
from rlver_dist.dialogue import EndReason
from rlver_dist.ledger.parquet import dialogues_path, write_dialogues
from rlver_dist.ledger.records import Phase
from tests.unit.test_metrics import make_dialogue, make_turn


def make_run(
    folder: Path, *, weight: float = 1.0, num_tokens: int = 3, reward: float = 0.3, name: str = "w"
) -> Path:
    dialogues = [
        make_dialogue(one, [make_turn(0, "yes", tokens, 30, 38)], EndReason.MAX_TURNS, 38)
        for one, tokens in (("a", 3), ("b", num_tokens))
    ]
    path = dialogues_path(folder, phase=Phase.train, iteration=1)
    write_dialogues(path, dialogues, iteration=1, phase=Phase.train, rewards={"a": 0.5, "b": reward})
    (folder / "policy").mkdir()
    save_file({name: torch.tensor([2.0, weight])}, folder / "policy" / "model.safetensors")
    return folder


def test_a_difference_says_what_differs(tmp_path):
    old = make_run(tmp_path / "old")
    same = compare(old, old)
    assert (same.dialogues, same.other_ids, same.other_rewards, same.weights) == ((2, 2), 0, 0, 0.0)
    assert compare(old, make_run(tmp_path / "ids", num_tokens=4)).other_ids == 1
    assert compare(old, make_run(tmp_path / "reward", reward=0.25)).other_rewards == 1
    assert compare(old, make_run(tmp_path / "weight", weight=0.75)).weights == 0.25
    assert compare(old, make_run(tmp_path / "name", name="v")).weights == float("inf")


@pytest.mark.parametrize(
    ("again", "new", "other", "equivalent"),
    [
        (1.25, 1.125, {}, True),  # 0.125 from either, spread 0.25
        (1.25, 1.5, {}, True),  # 0.25 from the second old run
        (1.25, 1.75, {}, False),
        (1.25, 1.0, {"reward": 0.2}, False),
        (1.0, 1.0, {}, True),
    ],
)
def test_weights_have_to_stay_within_the_spread_and_dialogues_the_same(
    tmp_path, again, new, other, equivalent
):
    first = make_run(tmp_path / "old")
    second = make_run(tmp_path / "again", weight=again)
    changed = make_run(tmp_path / "new", weight=new, **other)
    lines, verdict = report(compare(first, second), [compare(first, changed), compare(second, changed)])
    assert verdict is equivalent
    assert lines[-1] == ("equivalent" if equivalent else "different")


def test_an_override_takes_the_place_of_a_default():
    arguments = with_defaults(["+exp=ppo_think", "seed=9"])
    assert arguments.count("+exp=ppo_think") == 1 and "+exp=grpo_no_think" not in arguments
    assert "+on=tiny" in arguments and "seed=7" not in arguments
