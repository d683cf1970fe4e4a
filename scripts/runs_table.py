"""A table of runs, one row a run, its figures computed from the run's files.

    python -m scripts.runs_table docs/results/runs.csv runs/mine [runs/others ...] \\
        --rules D --cpu "2 cores" --commit 1a2b3c4 --note "from a fresh clone"

Adds a row for each folder, or replaces the row of the same name; other rows stay as they are. The options are
what no file of a run says. They count for all folders of the call; without one a row keeps what it has there.
A cell is empty where the run has no such figure.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlver_dist.files import write_whole
from scripts.run_files import RunFiles, load_run

TOLD = {
    "rules": "version of the appraisal rules (docs/results/README.md)",
    "cpu": "the machine's cores",
    "commit": "a commit whose docs/results holds the run's folder",
    "note": "what else a reader has to know",
}
"""Columns that no file of a run fills."""


def figures(run: RunFiles) -> dict[str, str]:
    """Cells of one run by column, without those of `TOLD`."""
    config = run.config
    summary = run.summary
    warm_up = summary.get("warm_up", {})
    algorithm = config["algorithm"]
    taught = config["warm_up"] if warm_up else {}
    return {
        "run": run.name,
        "recipe": run.recipe,
        "seed": str(config["seed"]),
        "iterations": str(summary["iterations"]),
        "model": config["model"]["path"],
        "dtype": config["model"]["dtype"],
        "lr": _number(config["learner"]["lr"]),
        "reward_placement": algorithm.get("reward_placement", ""),
        "repetition_penalty": _number(
            algorithm.get("guards", {}).get("repetition", {}).get("penalty"), scale=100
        ),
        "warm_up_dialogues": str(taught.get("dialogues", "")),
        "warm_up_turns": str(taught.get("max_turns", "")),
        "turns": str(config["rollout"]["max_turns"]),
        "evaluation_turns": str(config["evaluation"]["max_turns"]),
        "personas": str(summary["num_eval_personas"]),
        "judges": " / ".join(summary.get("judges", {}).get("after", [])),
        **_emotion("emotion", summary),
        **_emotion("second", summary.get("second_appraiser")),
        **_language("distinct2", summary),
        **_language("thinking_distinct2", summary),
        **_language("perplexity", summary),
        **_language("well_formed", summary),
        **_emotion("warm_up_emotion", warm_up, ends=False),
        **_emotion("warm_up_second", warm_up.get("second_appraiser"), ends=False),
        "base_distinct2": _number(warm_up.get("distinct2", {}).get("before")),
        "base_perplexity": _number(warm_up.get("perplexity", {}).get("before")),
        **_ends("training_emotion", run.series("reward/emotion_final")),
        **_ends("training_distinct2", run.series("rollout/distinct2")),
        **_ends("entropy", run.series("learner/entropy")),
        "repetition_last": _number(run.series("guard/repetition")[-1:]),
        "explained_variance": _number(run.series("critic/explained_variance")),
        "learner_tokens_per_s": _number(run.series("perf/learner_tokens_per_s")),
        "iteration_s": _number(run.series("time/iteration_s")),
        "wall_s": str(round(summary["wall_s"])),
    }


def _number(value: float | list[float] | None, *, scale: float = 1) -> str:
    """Four significant digits of a number or of the mean of several, empty for none."""
    if value is None or value == []:
        return ""
    mean = statistics.fmean(value) if isinstance(value, list) else value
    return f"{mean * scale:.4g}"


def _points(value: float) -> str:
    """Points of emotion with two decimals; what rounds to 0 has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def _emotion(name: str, row: Mapping[str, Any] | None, *, ends: bool = True) -> dict[str, str]:
    """Both means (with `ends`), their difference and its 95 % interval."""
    cells = {f"{name}_{end}": "" for end in ("before", "after") if ends}
    cells |= {f"{name}_{end}": "" for end in ("difference", "low", "high")}
    # A judge that failed for every user leaves no difference.
    if not row or row["difference"] is None:
        return cells
    low, high = row["interval95"]
    values = {"before": row["before"], "after": row["after"], "difference": row["difference"]}
    values |= {"low": low, "high": high}
    return {cell: _points(values[cell.removeprefix(f"{name}_")]) for cell in cells}


def _language(name: str, summary: Mapping[str, Any]) -> dict[str, str]:
    row = summary.get(name, {})
    return {f"{name}_{end}": _number(row.get(end)) for end in ("before", "after")}


def _ends(name: str, values: list[float]) -> dict[str, str]:
    return {f"{name}_first": _number(values[:1]), f"{name}_last": _number(values[-1:])}


def update(table: Path, folders: list[Path], told: Mapping[str, str | None]) -> int:
    """Write the rows of `folders` into `table`, which is made where there is none.

    Args:
        table: a CSV file of this script.
        folders: of finished runs.
        told: cells of `TOLD`; None keeps what the row has.

    Returns:
        Rows of the whole table.
    """
    rows: dict[str, dict[str, str]] = {}
    if table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
    columns = list(next(iter(rows.values()), {}))
    for folder in folders:
        cells = figures(load_run(folder))
        earlier = rows.get(cells["run"], {})
        for name, value in told.items():
            cells[name] = earlier.get(name, "") if value is None else value
        rows[cells["run"]] = cells
        # Columns that have come since the table was made stand last, so that earlier rows keep theirs.
        columns += [name for name in cells if name not in columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_whole(table, text.getvalue())
    return len(rows)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Add runs to a table of runs.")
    parser.add_argument("table", type=Path, help="the CSV file")
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir, or a folder of docs/results")
    for name, text in TOLD.items():
        parser.add_argument(f"--{name}", help=text)
    arguments = parser.parse_args()
    told = {name: getattr(arguments, name) for name in TOLD}
    print(f"{arguments.table}: {update(arguments.table, arguments.folders, told)} runs")


if __name__ == "__main__":
    main()
