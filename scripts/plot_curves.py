"""Learning curves of finished runs as one picture, a panel a run.

    python -m scripts.plot_curves docs/results/*/ --out docs/results/curve.png

The line is the mean final emotion of an iteration's training dialogues (`metrics.jsonl`). The points are the
held-out users' mean final emotion before and after, with a 95 % bootstrap interval over users, under the
appraiser that trains and under the second one (`held_out.json`). Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rlver_dist.errors import DataError
from rlver_dist.evaluation.statistics import paired_bootstrap
from scripts.run_files import RunFiles, load_run

RECIPES = {
    "ppo_think": "PPO, thinking first",
    "ppo_no_think": "PPO, replying at once",
    "grpo_think": "GRPO, thinking first",
    "grpo_no_think": "GRPO, replying at once",
}
"""Titles, in the order of the panels."""
TRAINING, HEARD, UNHEARD = "#7f7f7f", "#0072b2", "#d55e00"
"""Okabe and Ito's blue and vermilion, which colour-blind readers tell apart; markers differ as well."""
JUDGES = (
    ("emotion", HEARD, "o", "held-out users, appraiser of training"),
    ("second_emotion", UNHEARD, "s", "held-out users, second appraiser, unheard in training"),
)
SAMPLES = 10_000
SEED = 0


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value a user, and its 95 % percentile interval over users."""
    low, high = paired_bootstrap([0.0] * len(values), values, SAMPLES, SEED)
    return sum(values) / len(values), low, high


def gain(name: str, row: dict) -> str:
    """Difference after - before with its paired interval, as `summary.json` has it."""
    low, high = row["interval95"]
    return f"{name} {row['difference']:+.1f} [{low:.1f}, {high:.1f}]"


def draw(axes: Axes, run: RunFiles) -> None:
    """One run in one panel.

    Raises:
        DataError: the run has no `held_out.json`.
    """
    if run.held_out is None:
        raise DataError(f"{run.name}: no held_out.json, and the points are made from it")
    curve = run.series("reward/emotion_final")
    axes.plot(range(1, len(curve) + 1), curve, color=TRAINING, linewidth=1.8, label="training users")
    for key, color, marker, label in JUDGES:
        ends = []
        for position, when in ((0, "before"), (len(curve), "after")):
            values = [value for value in run.held_out[when][key] if value is not None]
            mean, low, high = mean_interval(values)
            ends.append((position, mean))
            axes.errorbar(
                position,
                mean,
                yerr=[[mean - low], [high - mean]],
                color=color,
                marker=marker,
                markersize=6,
                capsize=4,
                linestyle="none",
                label=label if when == "before" else None,
            )
        # Nothing was measured between the two points; the line says which ones belong together.
        axes.plot(*zip(*ends, strict=True), color=color, linestyle=":", linewidth=1.1, alpha=0.7)
    title = f"{RECIPES[run.recipe]} (seed {run.config['seed']}, {run.summary['num_eval_personas']} users)"
    axes.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=18)
    gains = (
        (0.0, gain("gain", run.summary), HEARD),
        (0.5, gain("second", run.summary["second_appraiser"]), UNHEARD),
    )
    for place, text, color in gains:
        axes.text(place, 1.03, text, transform=axes.transAxes, fontsize=8.5, color=color)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 4, 5, 10]))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot(runs: list[RunFiles], out: Path) -> None:
    """Write the picture of all runs, two panels a row, on one scale."""
    rows = (len(runs) + 1) // 2
    figure, grid = plt.subplots(
        rows, 2, figsize=(9, 3.1 * rows + 0.9), sharex=True, sharey=True, squeeze=False
    )
    panels = list(grid.flat)
    for axes, run in zip(panels, sorted(runs, key=lambda run: list(RECIPES).index(run.recipe)), strict=False):
        draw(axes, run)
    for axes in panels[len(runs) :]:
        axes.set_visible(False)
    panels[0].set_ylim(bottom=0)
    for axes in grid[:, 0]:
        axes.set_ylabel("mean final emotion (0 to 100)")
    for axes in grid[-1]:
        axes.set_xlabel("iteration")
    turns = {(run.config["rollout"]["max_turns"], run.config["evaluation"]["max_turns"]) for run in runs}
    spans = " or ".join(f"{training} and {held_out}" for training, held_out in sorted(turns))
    handles, labels = panels[0].get_legend_handles_labels()
    height = figure.get_figheight()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.3 / height),
        ncols=3,
        frameon=False,
        fontsize=9,
        columnspacing=1.4,
    )
    caption = (
        "Bars and brackets: 95 % bootstrap intervals over users. Training dialogues and held-out ones have "
        f"{spans} turns: their levels do not compare."
    )
    figure.text(0.5, 0.14 / height, caption, ha="center", fontsize=8.5, color="#404040")
    figure.tight_layout(rect=(0, 0.6 / height, 1, 1))
    figure.savefig(out, dpi=120)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Draw the learning curves of finished runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="output_dir, or a folder of docs/results")
    parser.add_argument("--out", type=Path, required=True, help="the picture, PNG")
    arguments = parser.parse_args()
    plot([load_run(folder) for folder in arguments.runs], arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
