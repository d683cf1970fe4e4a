"""What a run leaves on this machine when it is killed, and its removal by the next run.

Killed with SIGKILL, a run takes nothing down: Ray's processes and agents go on, and shared memory keeps its
segments. So each run notes its processes and the shared memory that they have mapped, in a file of its own.
The next start ends and removes what the notes of dead runs name, and the folders that carry such a run's pid
and start time in their names. Nothing else: every Python program's segments are called `psm_<something>`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
from dataclasses import asdict
from pathlib import Path

from rlver_dist.cluster.processes import (
    PROC,
    SHARED_MEMORY,
    Process,
    descendants,
    mapped_shared_memory,
    this_process,
)
from rlver_dist.files import write_whole


def notes_dir() -> Path:
    """Where this user's runs on this machine keep their notes."""
    return Path(tempfile.gettempdir()) / f"rlver_dist_{os.getuid()}" / "runs"


def folder_prefix(run: Process) -> str:
    """How the names of a run's own folders in shared memory begin."""
    return f"rlver_dist_{run.pid}-{run.start_time}_"


class Notes:
    """What this run has made on this machine so far."""

    def __init__(self) -> None:
        self._own = this_process()
        self._path = notes_dir() / f"{self._own.pid}-{self._own.start_time}.json"
        self._processes: set[Process] = set()
        self._shared: set[str] = set()

    def write(self) -> None:
        """Add the processes below this one and what they have mapped of shared memory.

        What was noted stays: a process whose parent has died is not found below this one any more.
        """
        below = descendants(self._own.pid)
        self._processes |= set(below)
        for each in below:
            self._shared |= {str(SHARED_MEMORY / name) for name in mapped_shared_memory(each.pid)}
        content = {
            "run": asdict(self._own),
            "processes": [asdict(each) for each in sorted(self._processes)],
            "shared_memory": sorted(self._shared),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(self._path, json.dumps(content))

    def remove(self) -> None:
        """Forget the notes, once the run has taken everything down itself."""
        self._path.unlink(missing_ok=True)


def remove_leftovers() -> list[str]:
    """End and remove what dead runs have left. Returns a line about each of them that had left anything."""
    lines = []
    for path in sorted(notes_dir().glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            run = Process(**content["run"])
            processes = [Process(**each) for each in content["processes"]]
            shared = [Path(name) for name in content["shared_memory"]]
        except (OSError, ValueError, TypeError, KeyError):
            path.unlink(missing_ok=True)  # cut while it was written, or of another version
            continue
        if run.alive:
            continue
        ended = _end(processes)
        freed = _remove([*shared, *_own_folders(run)])
        path.unlink(missing_ok=True)
        if ended or freed:
            lines.append(
                f"removed what the dead run of pid {run.pid} had left: {ended} processes, {freed} pieces of "
                f"shared memory"
            )
    return lines


def _own_folders(run: Process) -> list[Path]:
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    return [folder for place in places for folder in place.glob(f"{folder_prefix(run)}*")]


def _end(processes: list[Process]) -> int:
    alive = [each for each in processes if each.alive]
    for each in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each.pid, signal.SIGKILL)
    return len(alive)


def _remove(shared: list[Path]) -> int:
    """Delete each piece below /dev/shm or the folder of temporary files that no live process has mapped."""
    in_use: set[str] = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            in_use |= mapped_shared_memory(int(entry.name))
    removed = 0
    for path in shared:
        held = path.parent == SHARED_MEMORY and any(name.split("/")[0] == path.name for name in in_use)
        if held or not path.exists():
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed += 1
    return removed
