"""The table of runs: figures from a run's files, and rows that stay as they were."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from rlver_dist.errors import DataError
from scripts.run_files import load_run
from scripts.runs_table import TOLD, figures, update

CONFIG = {
    "model": {"path": "tiny", "dtype": "float32"},
    "algorithm": {
        "name": "grpo",
        "reward_placement": "turns",
        "guards": {"repetition": {"penalty": 0.1}},
    },
    "rollout": {"think": True, "max_turns": 3},
    "learner": {"lr": 0.0001},
    "warm_up": {"dialogues": 12, "max_turns": 6},
    "evaluation": {"max_turns": 8},
    "seed": 3,
}
SUMMARY = {
    "iterations": 2,
    "num_eval_personas": 40,
    "judges": {"before": ["embedded", "lexical"], "after": ["embedded", "lexical"]},
    "before": 9.876,
    "after": 43.211,
    "difference": 33.335,
    "interval95": [30.664, -0.001],
    "second_appraiser": {"before": None, "after": None, "difference": None, "interval95": None},
    "distinct2": {"before": 0.68123, "after": 0.7},
    "perplexity": {"before": 17.2468, "after": None},
    "well_formed": {"before": 0.9, "after": 1},
    "warm_up": {
        "before": 8.5,
        "after": 9.876,
        "difference": 1.376,
        "interval95": [-0.5, 2.5],
        "distinct2": {"before": 0.6, "after": 0.68123},
        "perplexity": {"before": 13.4, "after": 17.2468},
    },
    "wall_s": 2808.4,
}
METRICS = [
    {"iteration": 1, "reward/emotion_final": 20.0, "time/iteration_s": 50.0, "guard/repetition": 0.001},
    {"iteration": 2, "reward/emotion_final": 30.25, "time/iteration_s": 53.0, "guard/repetition": 0.04},
]


def make_run(folder: Path, *, config: dict = CONFIG, summary: dict = SUMMARY) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    return folder


def rows_of(table: Path) -> dict[str, dict[str, str]]:
    with table.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_figures_are_those_of_the_files(tmp_path):
    row = figures(load_run(make_run(tmp_path / "mine")))
    expected = {
        "run": "mine",
        "recipe": "grpo_think",
        "repetition_penalty": "10",
        "lr": "0.0001",
        "warm_up_dialogues": "12",
        "emotion_before": "9.88",
        "emotion_difference": "33.34",
        "emotion_low": "30.66",
        "emotion_high": "0.00",
        "second_difference": "",
        "distinct2_before": "0.6812",
        "perplexity_before": "17.25",
        "perplexity_after": "",
        "well_formed_after": "1",
        "warm_up_emotion_low": "-0.50",
        "warm_up_second_low": "",
        "base_perplexity": "13.4",
        "training_emotion_first": "20",
        "training_emotion_last": "30.25",
        "repetition_last": "0.04",
        "explained_variance": "",
        "iteration_s": "51.5",
        "wall_s": "2808",
        "judges": "embedded / lexical",
    }
    assert {name: row[name] for name in expected} == expected


def test_a_run_from_before_thoughts_guards_and_warm_up_has_empty_cells(tmp_path):
    config = {
        **CONFIG,
        "algorithm": {"name": "ppo"},
        "rollout": {"max_turns": 3},
    }
    config.pop("warm_up")
    summary = {key: SUMMARY[key] for key in ("iterations", "num_eval_personas", "before", "after", "wall_s")}
    summary |= {"difference": 1.0, "interval95": [0.5, 1.5]}
    row = figures(load_run(make_run(tmp_path / "old", config=config, summary=summary)))
    assert row["recipe"] == "ppo_no_think" and row["emotion_difference"] == "1.00"
    empty = "repetition_penalty reward_placement warm_up_dialogues second_low distinct2_after judges"
    assert [row[name] for name in empty.split()] == [""] * len(empty.split())


def test_rows_are_replaced_by_name_and_keep_what_they_were_told(tmp_path):
    table = tmp_path / "runs.csv"
    told = dict.fromkeys(TOLD)
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    assert update(table, [first, second], told | {"rules": "D", "note": "a, b"}) == 2
    (second / "summary.json").write_text(json.dumps({**SUMMARY, "iterations": 24}))
    assert update(table, [second, make_run(tmp_path / "third")], told | {"note": "goes on"}) == 3
    rows = rows_of(table)
    assert list(rows) == ["first", "second", "third"]
    assert [row["iterations"] for row in rows.values()] == ["2", "24", "2"]
    assert [row["rules"] for row in rows.values()] == ["D", "D", ""]
    assert [row["note"] for row in rows.values()] == ["a, b", "goes on", "goes on"]


def test_a_column_that_came_later_is_empty_in_earlier_rows(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("run,recipe\nold,ppo_think\n")
    update(table, [make_run(tmp_path / "new")], dict.fromkeys(TOLD))
    rows = rows_of(table)
    assert rows["old"]["recipe"] == "ppo_think" and rows["old"]["seed"] == ""
    assert rows["new"]["seed"] == "3"


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    folder = make_run(tmp_path / "running")
    (folder / "summary.json").unlink()
    with pytest.raises(DataError, match=r"running: no summary\.json"):
        load_run(folder)
