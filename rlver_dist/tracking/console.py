"""What a person sees of a run: progress bars, a line an iteration, and the results at the end.

On a terminal each phase has a bar that vanishes when it ends. Elsewhere (a file, a pipe, a job's log) there
are plain lines and no control codes. Text from models is printed without its control characters, so that a
reply cannot steer the terminal.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlver_dist.dialogue import Dialogue
from rlver_dist.tracking.curve import draw_curve
from rlver_dist.tracking.metrics import Summary
from rlver_dist.tracking.progress import Stage, duration, reported

SIDE_BY_SIDE_COLUMNS = 100
"""Narrowest terminal that shows two dialogues beside each other."""
MIN_CURVE_COLUMNS = 10
ITERATION_FIELDS = (
    ("reward", "reward/mean", ".3f"),
    ("success", "reward/success_share", ".2f"),
    ("format", "rollout/well_formed_share", ".2f"),
    ("len", "rollout/reply_tokens", ".0f"),
    ("kl", "learner/kl_ref", ".4f"),
)
ITERATION_PHASES = (("rollout", "time/rollout_s"), ("learner", "time/learner_s"), ("sync", "time/sync_s"))
LANGUAGE = (
    ("well-formed replies", "well_formed"),
    ("distinct2", "distinct2"),
    ("distinct2 of thoughts", "thinking_distinct2"),
    ("perplexity", "perplexity"),
)
"""What `summary.json` says of the language, and its keys."""
RESULT_FILES = (
    ("summary.json", "results"),
    ("held_out.json", "the same of each held-out user"),
    ("metrics.jsonl", "metrics of every iteration"),
    ("dialogues", "every dialogue and reward, as Parquet"),
    ("policy", "the trained model, as a Hugging Face folder"),
)


class Console:
    """Everything that a run prints; its methods are called from one thread."""

    def __init__(self, num_iterations: int, *, file: TextIO | None = None) -> None:
        """
        Args:
            num_iterations: iterations of the whole run.
            file: where to write; None takes standard output.
        """
        self._num_iterations = num_iterations
        self._file = file or sys.stdout
        self._rich = rich.console.Console(
            file=file, force_terminal=self._file.isatty(), highlight=False, markup=False, emoji=False
        )
        self._animated = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._encoding = getattr(self._file, "encoding", None) or "utf-8"
        # Curves are drawn with characters that other encodings lack.
        self._ascii_only = self._encoding.lower().replace("-", "") != "utf8"
        self._progress: Progress | None = None
        self._bars = 0
        # The first iteration has none to compare with.
        self._last_emotion = math.nan

    def note(self, text: str) -> None:
        """Print one message."""
        self._print(text)

    @contextmanager
    def phase(self, name: str, total: float | None, unit: str = "") -> Iterator[Stage]:
        """Show a long stage while the block runs: on a terminal as a bar, elsewhere as a line at its start,
        end and every 30 s.

        Args:
            name: what is being done.
            total: steps until the end; None where nobody knows yet.
            unit: what a step is, in the plural.

        Yields:
            The stage, to be called with each step.
        """
        if self._animated:
            stage, shown = self._bar(name, total, unit)
        else:
            stage = Stage(name, total, unit)
            shown = reported(stage, self._print)
            self._print(
                f"{name} ..." if total is None else f"{name}: {total:.0f}{f' {unit}' if unit else ''} ..."
            )
        with shown:
            try:
                yield stage
            except BaseException as error:
                # An interrupt is no failure.
                verb = "failed" if isinstance(error, Exception) else "stopped"
                self._print(f"{name}: {verb} after {duration(stage.elapsed_s)}")
                raise
        # A stage that ends early, say for a dialogue that its user left, says how far it came.
        if not self._animated:
            missing = stage.total is not None and stage.done < stage.total
            count = f"{stage.done:.0f} of {stage.total:.0f}, " if missing else ""
            self._print(f"{name}: {count}done in {duration(stage.elapsed_s)}")

    def iteration(self, summary: Mapping[str, float]) -> None:
        """Print the line of one iteration from its reduced metrics; keys that are absent are left out.

        `progress/iteration` has to be there and counts finished iterations: it is 1 after the first.
        """
        emotion = summary.get("reward/emotion_final", math.nan)
        change = emotion - self._last_emotion
        self._last_emotion = emotion
        fields = [f"iteration {summary['progress/iteration']:.0f}/{self._num_iterations}"]
        fields.append(f"emotion {emotion:.1f}" + (f" ({change:+.1f})" if math.isfinite(change) else ""))
        fields += [f"{name} {summary[key]:{form}}" for name, key, form in ITERATION_FIELDS if key in summary]
        if "time/iteration_s" in summary:
            phases = ", ".join(
                f"{name} {summary[key]:.0f}" for name, key in ITERATION_PHASES if key in summary
            )
            fields.append(duration(summary["time/iteration_s"]) + (f" ({phases})" if phases else ""))
        if summary.get("time/left_s"):
            fields.append(f"about {duration(summary['time/left_s'])} left")
        self._print("  ".join(fields))

    def finish(
        self,
        curve: Sequence[float],
        output_dir: str | Path,
        summary: Summary,
        pairs: Sequence[tuple[Dialogue, Dialogue]],
    ) -> None:
        """Print the end of a run.

        Args:
            curve: mean final emotion (0 to 100) of each training iteration.
            output_dir: the run's folder; what it holds of `RESULT_FILES` is listed.
            summary: the content of `summary.json`; empty where there was no evaluation.
            pairs: dialogues with one persona, before and after training.
        """
        for before, after in pairs:
            self._print(f"\nThe same user ({before.persona_id}), before and after training")
            self._print_pair(before, after)
        if drawn := draw_curve(
            curve, width=max(MIN_CURVE_COLUMNS, min(60, self._rich.width - 12)), ascii_only=self._ascii_only
        ):
            self._print("\nMean final emotion of the training dialogues (0 to 100)")
            self._print("\n".join(drawn))
        if lines := _result_lines(summary):
            self._print("\nHeld-out users, before -> after training")
            self._print("\n".join(lines))
        folder = Path(output_dir)
        wall = f" after {duration(summary['wall_s'])}" if "wall_s" in summary else ""
        self._print(f"\nResults{wall} in {folder.resolve()}")
        for name, what in RESULT_FILES:
            if (folder / name).exists():
                self._print(f"  {name:<14} {what}")

    def _bar(self, name: str, total: float | None, unit: str) -> tuple[Stage, AbstractContextManager[None]]:
        """A stage whose steps move a bar, and the block in which the bar is there."""
        # Phases may nest and overlap, and a terminal has one live area: it lasts as long as any of them.
        progress = self._progress or self._start_progress()
        self._bars += 1
        task = progress.add_task(self._clean(name), total=total, beside="")

        def move(stage: Stage) -> None:
            progress.update(task, completed=stage.done, total=stage.total, beside=self._clean(stage.beside))

        def remove() -> None:
            progress.remove_task(task)
            self._bars -= 1
            if self._bars == 0:
                progress.stop()
                self._progress = None

        @contextmanager
        def shown() -> Iterator[None]:
            try:
                yield
            finally:
                remove()

        return Stage(name, total, unit, move), shown()

    def _start_progress(self) -> Progress:
        bar = (
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        beside = TextColumn("{task.fields[beside]}", markup=False)
        self._progress = Progress(*bar, *times, beside, console=self._rich, transient=True)
        self._progress.start()
        return self._progress

    def _print_pair(self, before: Dialogue, after: Dialogue) -> None:
        texts = [self._clean("\n".join(_dialogue_lines(dialogue))) for dialogue in (before, after)]
        # In a file nobody knows how wide the reader's window is.
        if self._animated and self._rich.width >= SIDE_BY_SIDE_COLUMNS:
            table = Table.grid(padding=(0, 2), expand=True)
            table.add_column(ratio=1)
            table.add_column(ratio=1)
            table.add_row(Text("before", style="bold"), Text("after", style="bold"))
            table.add_row(Text(texts[0]), Text(texts[1]))
            self._rich.print(table)
            return
        for when, text in zip(("before", "after"), texts, strict=True):
            self._print(f"-- {when}")
            self._print(text)

    def _print(self, text: str) -> None:
        # Lines stay whole in files, for grep; a terminal wraps them itself.
        self._rich.print(Text(self._clean(text)), soft_wrap=True)

    def _clean(self, text: str) -> str:
        """Printable text in the file's encoding: control characters become spaces, foreign characters
        question marks."""
        printable = "".join(
            character if character.isprintable() or character == "\n" else " " for character in text
        )
        return printable.encode(self._encoding, "replace").decode(self._encoding)


def _dialogue_lines(dialogue: Dialogue) -> list[str]:
    """The talk as both sides heard it, with the emotion that each reply led to; what was thought stands in
    brackets."""
    lines = [f"user [{dialogue.start_emotion:.0f}]: {_one_line(dialogue.opening)}"]
    for turn in dialogue.turns:
        if turn.thinking:
            lines.append(f"  [thinks: {_one_line(turn.thinking)}]")
        lines.append(
            f"policy [{turn.emotion_before:.0f} -> {turn.emotion_after:.0f}]: {_one_line(turn.reply)}"
        )
        if turn.user_message is not None:
            lines.append(f"user [{turn.emotion_after:.0f}]: {_one_line(turn.user_message)}")
    return [*lines, f"end: {dialogue.end_reason.value}, emotion {dialogue.final_emotion:.0f}"]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _result_lines(summary: Summary) -> list[str]:
    """What `summary.json` says, for people; keys that are absent are left out."""
    lines = [
        f"  {name:<26} {_comparison(result)}"
        for name, result in (
            ("emotion", summary),
            ("emotion, second judge", summary.get("second_appraiser", {})),
            ("emotion, warm-up alone", summary.get("warm_up", {})),
            ("  the same, second judge", summary.get("warm_up", {}).get("second_appraiser", {})),
        )
        if result.get("difference") is not None
    ]
    for name, key in LANGUAGE:
        # Without thinking there are no thoughts to compare.
        if key in summary and (any(summary[key].values()) or key != "thinking_distinct2"):
            lines.append(
                f"  {name:<26} {summary[key]['before']:.3g} -> "
                f"{summary[key]['after']:.3g}{_base_model_figure(summary, key)}"
            )
    judges = summary.get("judges", {}).get("after", [])
    lines += [f"  {name:<26} {judge}" for name, judge in zip(("judge", "second judge"), judges, strict=False)]
    if "num_eval_personas" in summary:
        lines.append(f"  {'users':<26} {summary['num_eval_personas']}")
    return lines


def _base_model_figure(summary: Summary, key: str) -> str:
    """The base model's figure, since a warm-up may have changed it more than training did; empty where there
    is none.

    It replied without thoughts and their format.
    """
    came = summary.get("warm_up", {}).get(key, {}).get("before")
    return (
        "" if came is None or key in ("well_formed", "thinking_distinct2") else f" (base model: {came:.3g})"
    )


def _comparison(result: Summary) -> str:
    low, high = result["interval95"]
    change = f"{result['difference']:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}"
    return f"{result['before']:.1f} -> {result['after']:.1f} ({change})"
