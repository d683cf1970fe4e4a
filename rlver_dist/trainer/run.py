"""From a checked configuration to a finished run: build the parts on Ray, drive them, report, and take
everything down again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlver_dist.cluster.build import Built, build
from rlver_dist.cluster.layout import Layout, resolve_layout
from rlver_dist.cluster.metrics import RayMetrics
from rlver_dist.cluster.session import close_session, open_session, unwrap_ray_errors
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.dialogue import Dialogue
from rlver_dist.errors import EXIT_INTERRUPTED, BudgetError
from rlver_dist.evaluation.held_out import HeldOut, compare
from rlver_dist.evaluation.second_judge import second_judge
from rlver_dist.files import write_whole
from rlver_dist.ledger.parquet import dialogues_path, read_dialogues
from rlver_dist.ledger.records import Phase
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.simulator.protocol import Judge
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.jsonl import JsonlTracker, Tracker
from rlver_dist.tracking.wandb import WandbTracker, start_wandb
from rlver_dist.trainer.checkpoints import CheckpointStore, copy_warm_start, select_checkpoint
from rlver_dist.trainer.components import Parts
from rlver_dist.trainer.driver import Driver
from rlver_dist.trainer.forecast import Forecast

NUM_PAIRS_SHOWN = 2


def run_on_cluster(
    config: RunConfig, train: list[Persona], evaluation: list[Persona], on_accepted: Callable[[], None]
) -> int:
    """Run `config` and return the exit code; `on_accepted` is called once the cluster has been found large
    enough."""
    started = time.monotonic()
    console = Console(config.num_iterations)
    learners = ("policy", "critic") if config.has_critic else ("policy",)
    store = CheckpointStore(Path(config.output_dir), config.keep_checkpoints)
    start = select_checkpoint(store, config.resume, learners, config.resume_fingerprint)
    start_checkpoint = store.latest()
    try:
        # In the main thread and before our own signal handlers: Ray installs some, and ours have to be the
        # last.
        with console.phase("starting Ray", 1) as advance:
            session = open_session(config.cluster)
            advance(1)
        layout = resolve_layout(
            config, num_gpus=session.num_gpus, num_cpus=session.num_cpus, num_nodes=session.num_nodes
        )
        if start is not None:
            layout.require_ranks(str(start), CheckpointStore.read(start).shape)
        on_accepted()
        if session.dashboard:
            console.note(
                f"Ray dashboard: http://{session.dashboard}"
                + (f" (token {session.token})" if session.token else "")
            )
        return asyncio.run(
            _until_interrupted(
                config,
                start_checkpoint,
                console,
                _run(config, layout, start, train, evaluation, console, started),
            )
        )
    finally:
        close_session()


async def _until_interrupted(
    config: RunConfig, start_checkpoint: Path | None, console: Console, running: Coroutine[Any, Any, None]
) -> int:
    with _interruptible() as interrupted:
        try:
            await running
            return 0
        except BudgetError as error:
            raise BudgetError(f"{error}; {resume_hint(config, start_checkpoint)}") from error
        except asyncio.CancelledError:
            if not interrupted():
                raise
            console.note(f"interrupted; {resume_hint(config, start_checkpoint)}")
            return EXIT_INTERRUPTED


def resume_hint(config: RunConfig, start_checkpoint: Path | None) -> str:
    """What a run that stopped early has saved, and the command that goes on from there.

    Args:
        config: of the run.
        start_checkpoint: the newest checkpoint when it started; None where there was none.
    """
    newest = CheckpointStore(Path(config.output_dir), config.keep_checkpoints).latest()
    # What was done before training is written over step_0 again and again.
    if newest is None or (newest == start_checkpoint and newest.name != "step_0"):
        again = _command(config, but=("output_dir=",))
        return (
            f"stopped with no new checkpoint yet (save_every={config.save_every}); start again with: {again}"
        )
    return f"stopped with {newest.name} saved; go on with: {_command(config, but=('output_dir=', 'resume='))}"


async def _run(
    config: RunConfig,
    layout: Layout,
    start: Path | None,
    train: list[Persona],
    evaluation: list[Persona],
    console: Console,
    started: float,
) -> None:
    built: Built | None = None
    trackers = _trackers(config, 0 if start is None else CheckpointStore.read(start).iteration)
    try:
        with unwrap_ray_errors():
            warm_start = None if start is None else copy_warm_start(start, Path(config.output_dir))
            built = await build(config, layout, console, warm_start)
            async with second_judge(config) as judge:
                driver = Driver(
                    config,
                    _parts(config, layout, built, judge, console, trackers),
                    train,
                    evaluation,
                    started=started,
                )
                if start is not None:
                    await driver.resume(start)
                before, after = await driver.run()
        _report(config, console, driver, trackers, before, after)
    finally:
        if built is not None:
            with contextlib.suppress(Exception):
                await built.close()
        for tracker in trackers:
            tracker.close()


def _trackers(config: RunConfig, finished: int) -> list[Tracker]:
    output = Path(config.output_dir)
    trackers: list[Tracker] = [
        JsonlTracker(output / "metrics.jsonl", first_iteration=finished + 1),
        RayMetrics(output.name),
    ]
    wandb = start_wandb(config.tracking, output, asdict(config))
    return trackers if wandb is None else [*trackers, wandb]


def _parts(
    config: RunConfig,
    layout: Layout,
    built: Built,
    judge: Judge | None,
    console: Console,
    trackers: list[Tracker],
) -> Parts:
    return Parts(
        generate=built.engines.generate,
        users=built.users.respond,
        evaluation_users=built.evaluation_users.respond,
        second_judge=judge,
        evaluation_rules=resolve_rules(config.simulator.for_evaluation()).emotion,
        policy=built.learner,
        critic=built.critic,
        sync=built.sync,
        service_metrics=built.metrics,
        tokenizer=built.tokenizer,
        renderer=built.renderer,
        plain_renderer=built.plain_renderer,
        trackers=trackers,
        console=console,
        forecast=Forecast(config),
        ranks=layout.ranks,
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a cancellation of this task; yields whether there was one.

    The first one lets an update that has begun finish and be saved; the second one does not wait for that.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    received: list[int] = []

    def interrupt(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            print(
                "\nstopping after the update at hand; once more to stop without it",
                file=sys.stderr,
                flush=True,
            )
        if len(received) <= 2:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield lambda: bool(received)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _command(config: RunConfig, but: tuple[str, ...]) -> str:
    """The command of this process without arguments that begin with one of `but`, and with its output folder
    pinned."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith(but)]
    return shlex.join([sys.executable, "-m", "rlver_dist.launch", *kept, f"output_dir={config.output_dir}"])


def _report(
    config: RunConfig,
    console: Console,
    driver: Driver,
    trackers: list[Tracker],
    before: HeldOut | None,
    after: HeldOut | None,
) -> None:
    output = Path(config.output_dir)
    summary: dict[str, Any] = {
        "iterations": driver.progress.iteration,
        "curve": driver.progress.curve,
        "wall_s": driver.wall_s,
    }
    pairs = []
    if after is not None:
        held_out = {
            "control": driver.progress.control or None,
            "before": before and asdict(before),
            "after": asdict(after),
        }
        _write_json(output / "held_out.json", held_out)
        if before is None:
            summary |= {"after": statistics.fmean(after.emotion), "num_eval_personas": len(after.emotion)}
    if before is not None and after is not None:
        summary = {**compare(before, after, config.evaluation.bootstrap_samples), **summary}
        if driver.progress.control and driver.progress.warmed_up:
            summary["warm_up"] = compare(
                HeldOut(**driver.progress.control), before, config.evaluation.bootstrap_samples
            )
        first = _by_persona(dialogues_path(output, phase=Phase.before, iteration=0))
        second = _by_persona(dialogues_path(output, phase=Phase.after, iteration=driver.progress.iteration))
        pairs = [(first[persona], second[persona]) for persona in first if persona in second][
            :NUM_PAIRS_SHOWN
        ]
    _write_json(output / "summary.json", summary)
    for tracker in trackers:
        if isinstance(tracker, WandbTracker):
            tracker.summarize(summary)
    console.finish(driver.progress.curve, output, summary, pairs)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, json.dumps(_finite(value), indent=2, allow_nan=False))


def _by_persona(path: Path) -> dict[str, Dialogue]:
    """Dialogues of one evaluation; none where a run goes on from another folder's checkpoint."""
    return {} if not path.exists() else {dialogue.persona_id: dialogue for dialogue in read_dialogues(path)}


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
