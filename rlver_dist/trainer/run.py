"""From a checked configuration to a finished run: build the components on Ray, drive them, report, and take
everything down again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from rlver_dist.cluster.build import build
from rlver_dist.cluster.layout import Layout, resolve_layout
from rlver_dist.cluster.leftovers import Notes, remove_leftovers
from rlver_dist.cluster.metrics import RayMetrics
from rlver_dist.cluster.session import close_session, open_session, unwrap_ray_errors
from rlver_dist.config.run import RunConfig
from rlver_dist.config.tracking import TrackingConfig
from rlver_dist.data.persona import Persona
from rlver_dist.errors import EXIT_INTERRUPTED, BudgetError
from rlver_dist.evaluation.second_judge import second_judge
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.forecast import Forecast
from rlver_dist.tracking.jsonl import JsonlTracker, Tracker
from rlver_dist.tracking.wandb import WandbTracker, start_wandb
from rlver_dist.trainer.checkpoints import CheckpointStore, copy_warm_start, select_checkpoint
from rlver_dist.trainer.driver import Driver
from rlver_dist.trainer.results import shown_pairs, write_results
from rlver_dist.trainer.run_lock import run_lock

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a run in good order: Ctrl-C, a container's end, a lost terminal, and what batch systems
send ahead of a preemption (SLURM's `--signal=USR1`)."""


def run_on_cluster(
    config: RunConfig, train: list[Persona], evaluation: list[Persona], on_accepted: Callable[[], None]
) -> int:
    """Run `config` and return the exit code; `on_accepted` is called once the cluster has been found large
    enough.

    Raises:
        ResourceError: another run has the output folder.
    """
    started = time.monotonic()
    console = Console(config.num_iterations)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_lock(Path(config.output_dir)))
        for line in remove_leftovers():
            console.note(line)
        learners = ("policy", "critic") if config.has_critic else ("policy",)
        store = CheckpointStore(Path(config.output_dir), config.keep_checkpoints)
        # Before Ray starts, so that a checkpoint that does not fit is refused at once.
        start = select_checkpoint(store, config.resume, learners, config.resume_fingerprint)
        # Not `start`, which may be an older one, or of another run.
        start_checkpoint = store.latest()
        notes = Notes()
        stack.callback(notes.remove)
        stack.callback(close_session)
        # In the main thread and before our own signal handlers: Ray installs some, and ours have to be the
        # last.
        with console.phase("starting Ray", 1) as advance:
            session = open_session(config.cluster)
            notes.write()
            advance(1)
        layout = resolve_layout(
            config, num_gpus=session.num_gpus, num_cpus=session.num_cpus, num_nodes=session.num_nodes
        )
        # The number of ranks is known only now that Ray has told its GPUs.
        if start is not None:
            layout.require_ranks(str(start), CheckpointStore.read(start).shape)
        # From here on the run belongs to its folder.
        on_accepted()
        if session.dashboard:
            token = f" (token {session.token})" if session.token else ""
            console.note(f"Ray dashboard: http://{session.dashboard}{token}")
        hint = functools.partial(
            resume_hint,
            store,
            start_checkpoint,
            output_dir=config.output_dir,
            save_every=config.save_every,
        )
        running = _run(config, layout, start, train, evaluation, console, started, notes)
        return asyncio.run(_until_interrupted(running, console, hint))


async def _until_interrupted(running: Awaitable[None], console: Console, hint: Callable[[], str]) -> int:
    """Await `running`; where it is interrupted, or its budget is used up, say by `hint` how it goes on."""
    with _interruptible() as interrupted:
        try:
            await running
            return 0
        except BudgetError as error:
            raise BudgetError(f"{error}; {hint()}") from error
        except asyncio.CancelledError:
            # Something inside was cancelled, which is a defect and keeps its traceback.
            if not interrupted():
                raise
            console.note(f"interrupted; {hint()}")
            return EXIT_INTERRUPTED


def resume_hint(
    store: CheckpointStore, start_checkpoint: Path | None, *, output_dir: str, save_every: int
) -> str:
    """What a run that stopped early has saved, and the command that goes on from there.

    Args:
        store: of the run's folder.
        start_checkpoint: the newest checkpoint when it started; None where there was none.
        output_dir: the run's folder, as the configuration names it.
        save_every: iterations between checkpoints.
    """
    newest = store.latest()
    # What was done before training is written over step_0 again and again.
    if newest is None or (newest == start_checkpoint and newest.name != "step_0"):
        again = _command(output_dir, but=("output_dir=",))
        return f"stopped with no new checkpoint yet (save_every={save_every}); start again with: {again}"
    # The own checkpoint is the newest one from now on, so the one that was named at the start goes.
    go_on = _command(output_dir, but=("output_dir=", "resume="))
    return f"stopped with {newest.name} saved; go on with: {go_on}"


async def _run(
    config: RunConfig,
    layout: Layout,
    start: Path | None,
    train: list[Persona],
    evaluation: list[Persona],
    console: Console,
    started: float,
    notes: Notes,
) -> None:
    output = Path(config.output_dir)
    finished = 0 if start is None else CheckpointStore.read(start).iteration
    # Before the cluster is built: a tracker that does not start then costs seconds.
    trackers = _trackers(config.tracking, output, asdict(config), finished)
    try:
        async with contextlib.AsyncExitStack() as stack:
            # Only what runs on Ray: results that cannot be written are no failure of an actor.
            with unwrap_ray_errors():
                judge = await stack.enter_async_context(second_judge(config.simulator, config.evaluation))
                components = await stack.enter_async_context(
                    build(
                        config,
                        layout,
                        warm_start=None if start is None else copy_warm_start(start, output),
                        second_judge=judge,
                        console=console,
                        trackers=trackers,
                        forecast=Forecast(
                            rollout=config.rollout,
                            algorithm=config.algorithm,
                            evaluation=config.evaluation,
                            warm_up=config.warm_up,
                        ),
                    )
                )
                notes.write()
                driver = Driver(config, components, train, evaluation, started=started)
                if start is not None:
                    await driver.resume(start)
                before, after = await driver.run()
            progress = driver.progress
            summary = write_results(
                output,
                progress,
                after,
                wall_s=driver.wall_s,
                bootstrap_samples=config.evaluation.bootstrap_samples,
            )
            for tracker in trackers:
                if isinstance(tracker, WandbTracker):
                    tracker.summarize(summary)
            compared = before is not None and after is not None
            pairs = shown_pairs(output, progress.iteration) if compared else []
            # Shown before actors are ended, which may take some seconds.
            console.finish(progress.curve, output, summary, pairs)
    finally:
        for tracker in trackers:
            tracker.close()


def _trackers(
    tracking: TrackingConfig, output: Path, run_config: dict[str, object], finished: int
) -> list[Tracker]:
    trackers: list[Tracker] = [
        JsonlTracker(output / "metrics.jsonl", first_iteration=finished + 1),
        # Several runs may share a cluster, and a folder's name tells them apart.
        RayMetrics(output.name),
    ]
    wandb = start_wandb(tracking, output, run_config)
    return trackers if wandb is None else [*trackers, wandb]


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the signals of `STOPPING` into a cancellation of this task; yields whether there was one.

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
        # Two are all that the driver tells apart.
        if len(received) <= 2:
            task.cancel()

    # One that is ignored stays so: nohup means a run to go on without its terminal.
    handled = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield lambda: bool(received)
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _command(output_dir: str, but: tuple[str, ...]) -> str:
    """The command of this process without arguments that begin with one of `but`, and with its output folder
    pinned: its default holds the time of the start."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith(but)]
    return shlex.join([sys.executable, "-m", "rlver_dist.launch", *kept, f"output_dir={output_dir}"])
