"""Runs started through the command line as a user starts them, watched while they run, and ended with all
that they started."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.timing import hang_limit

TIMEOUT_S = 420
GRACE_S = 10
SHARED_MEMORY = Path("/dev/shm")
OURS = ("psm_*", "rlver_dist_*", "deepspeed_allreduce_buffer_*")
"""What a run makes in shared memory."""


@dataclass
class Finished:
    """A run that has ended, and what an outside observer saw of it meanwhile."""

    folder: Path
    code: int
    output: str
    actors: set[str] = field(default_factory=set)
    metrics: str = ""
    left_over: list[str] = field(default_factory=list)


class Launch:
    """One `python -m rlver_dist.launch`, in a session of its own."""

    def __init__(
        self, folder: Path, *overrides: str, recipe: str = "grpo_no_think", on: str = "tiny"
    ) -> None:
        self.folder = folder
        arguments = [
            f"+exp={recipe}",
            f"+on={on}",
            "tracking.wandb=offline",
            f"output_dir={folder}",
            *overrides,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "rlver_dist.launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Ray leaves the token of other tests' clusters in this process's environment.
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
                "PYTHONUNBUFFERED": "1",
            },
        )
        self.lines: list[str] = []
        self._children: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._remember_children()

    def _remember_children(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._children |= {
                child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)
            }

    def wait_for(self, pattern: str) -> re.Match:
        """The first match of `pattern` in the output."""
        deadline = time.monotonic() + hang_limit(TIMEOUT_S)
        while time.monotonic() < deadline:
            if found := re.search(pattern, "".join(self.lines)):
                return found
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.2)
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self.lines)}")

    def finish(self) -> Finished:
        """Wait for the end; processes that outlive it by ten seconds are `left_over`."""
        try:
            code = self.process.wait(timeout=hang_limit(TIMEOUT_S))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{''.join(self.lines)}") from None
        self._reader.join(timeout=GRACE_S)
        left_over = [f"{child.pid} {child.name()}" for child in self._alive(hang_limit(GRACE_S))]
        return Finished(self.folder, code, "".join(self.lines), left_over=left_over)

    def end(self) -> None:
        """End whatever of it still runs; harmless where nothing does."""
        self._remember_children()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for child in self._alive(0):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._alive(hang_limit(GRACE_S))

    def _alive(self, timeout_s: float) -> list[psutil.Process]:
        """Those of its processes that still run after so many seconds."""
        _, alive = psutil.wait_procs(list(self._children.values()), timeout=timeout_s)
        return [child for child in alive if _runs(child)]


@contextlib.contextmanager
def launching() -> Iterator[Callable[..., Launch]]:
    """Yields what starts runs; on leaving, none of their processes is there, nor what they left in shared
    memory."""
    before, started = _shared_memory(), []

    def launch(*arguments: object, **options: object) -> Launch:
        started.append(Launch(*arguments, **options))
        return started[-1]

    try:
        yield launch
    finally:
        for one in started:
            one.end()
        left = _shared_memory() - before
        for path in left - _in_use(left):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _shared_memory() -> set[Path]:
    return {path for pattern in OURS for path in SHARED_MEMORY.glob(pattern)}


def _in_use(paths: set[Path]) -> set[Path]:
    """Those of `paths` that a process has mapped: other programs name theirs alike."""
    maps = []
    for process in Path("/proc").glob("[0-9]*/maps") if paths else ():
        with contextlib.suppress(OSError):
            maps.append(process.read_text(errors="replace"))
    return {path for path in paths if any(str(path) in one for one in maps)}
