"""What a finished run showed, as a Markdown page and its raw data.

    python -m scripts.report_run runs/mine docs/results/grpo_no_think_cpu

Copies `config.yaml`, `summary.json`, `held_out.json` and `metrics.jsonl`, and writes `README.md` with the
figures, the mean seconds of each phase and the first replies of the first evaluation users before and after,
as they are.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from rlver_dist.dialogue import Dialogue
from rlver_dist.ledger.parquet import dialogues_path, read_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.tracking.curve import draw_curve
from scripts.run_files import RunFiles, load_run

NUM_REPLIES = 5
PHASES = (
    "time/rollout_s",
    "time/learner_s",
    "time/scoring_s",
    "time/policy_update_s",
    "time/critic_update_s",
    "time/sync_s",
    "time/iteration_s",
    "perf/rollout_tokens_per_s",
    "perf/learner_tokens_per_s",
)
ENDS = (
    "reward/mean",
    "reward/emotion_final",
    "critic/explained_variance",
    "learner/entropy",
    "learner/logprob_gap",
    "rollout/reply_tokens",
    "rollout/thinking_tokens",
    "rollout/well_formed_share",
    "rollout/truncated_share",
    "rollout/distinct2",
    "rollout/thinking_distinct2",
)


def figures(summary: dict[str, Any]) -> list[str]:
    """The before-and-after table."""
    lines = ["| | before | after | difference | 95 % interval |", "|---|---|---|---|---|"]
    warm_up = summary.get("warm_up", {})
    for name, row in (
        ("emotion", summary),
        ("emotion, second judge", summary.get("second_appraiser")),
        ("emotion, warm-up alone", warm_up),
        ("emotion, second judge, warm-up alone", warm_up.get("second_appraiser")),
    ):
        if row and row["difference"] is not None:
            low, high = row["interval95"]
            lines.append(
                f"| {name} | {row['before']:.2f} | {row['after']:.2f} | {row['difference']:+.2f} | "
                f"{low:+.2f} to {high:+.2f} |"
            )
    for name, of in (("", summary), (", warm-up alone", warm_up)):
        for key in ("distinct2", "thinking_distinct2", "perplexity", "well_formed"):
            before, after = (of.get(key, {}).get(when) for when in ("before", "after"))
            # The base model replied without thoughts and their format.
            compares = of is summary or key in ("distinct2", "perplexity")
            if (
                before is None
                or after is None
                or not compares
                or (key == "thinking_distinct2" and not before and not after)
            ):
                continue
            lines.append(
                f"| {key}{name} | {before:.3g} | {after:.3g} | "
                f"{f'x {after / before:.2f}' if before else ''} | |"
            )
    return lines


def phases(run: RunFiles) -> list[str]:
    """Mean of each phase over the iterations, and the ends of some curves."""
    lines = ["| metric | mean over iterations |", "|---|---|"]
    for key in PHASES:
        values = run.series(key)
        lines += [f"| {key} | {sum(values) / len(values):.1f} |"] if values else []
    lines += ["", "| metric | first | last |", "|---|---|---|"]
    for key in ENDS:
        values = run.series(key)
        lines += [f"| {key} | {values[0]:.3g} | {values[-1]:.3g} |"] if values else []
    return lines


def replies(before: list[Dialogue], after: list[Dialogue]) -> list[str]:
    """First replies to the same openings."""
    lines = []
    for old, new in list(zip(before, after, strict=True))[:NUM_REPLIES]:
        lines += [f"- **{old.persona_id}**: {old.opening}"]
        for when, dialogue in (("before", old), ("after", new)):
            turn = dialogue.turns[0]
            thought = f"*{' '.join(turn.thinking.split())}* " if turn.thinking else ""
            lines.append(
                f"  - {when} ({turn.emotion_after - turn.emotion_before:+.1f}): "
                f"{thought}{' '.join(turn.reply.split())}"
            )
    return lines


def write_page(run: Path, out: Path) -> Path:
    """Turn the finished run in `run` into a page and its raw data in `out`. Returns the page."""
    files = load_run(run)
    summary = files.summary
    # A run that went on has evaluations of every length that it ended with.
    after = read_dialogues(dialogues_path(run, phase=Phase.after, iteration=summary["iterations"]))
    before = read_dialogues(dialogues_path(run, phase=Phase.before, iteration=0))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "held_out.json", "metrics.jsonl"):
        shutil.copy(run / name, out / name)
    # The folder on the machine that ran is nobody else's business.
    config = re.sub(
        r"(?m)^output_dir:.*$",
        f"output_dir: runs/{out.name}",
        (run / "config.yaml").read_text(encoding="utf-8"),
    )
    (out / "config.yaml").write_text(config, encoding="utf-8")
    length = f"{summary['wall_s'] / 60:.1f} minutes after set-up"
    page = [
        f"# {out.name}",
        "",
        f"{summary['iterations']} iterations, {summary['num_eval_personas']} held-out users, {length}; "
        f"seed {files.config['seed']}.",
        "Raw data: `config.yaml`, `summary.json`, `held_out.json`, `metrics.jsonl`. Made by "
        "`scripts/report_run.py`.",
        "",
        *figures(summary),
        "",
        *phases(files),
        "",
        "## Mean final emotion of the training dialogues",
        "```",
        *draw_curve(summary["curve"]),
        "```",
        "",
        "## First replies to the same users, as they are (thoughts in italics)",
        *replies(before, after),
    ]
    (out / "README.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    return out / "README.md"


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Turn a finished run into a page of results.")
    parser.add_argument("run", type=Path, help="a run's output_dir")
    parser.add_argument("out", type=Path, help="where the page and the raw data go")
    arguments = parser.parse_args()
    print(write_page(arguments.run, arguments.out))


if __name__ == "__main__":
    main()
