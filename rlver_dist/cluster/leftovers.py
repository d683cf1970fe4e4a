"""What a run leaves on this machine when it is killed, and its removal by the next run.

Killed with SIGKILL, a run takes nothing down: Ray's processes and agents go on, and shared memory keeps its
segments. So each run notes its processes and the segments that they have mapped, in a file of its own. The
next start ends and removes what the notes of dead runs name, and the folders that carry such a run's pid and
start time in their names. Nothing else: neither segments of other programs, which are called alike
(`psm_<something>`), nor what the user keeps in /dev/shm, such as models.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rlver_dist.cluster.processes import (
    PROC,
    SHARED_MEMORY,
    Process,
    descendants,
    machine_id,
    mapped_shared_memory,
    this_process,
)
from rlver_dist.files import write_whole

SEGMENTS = ("psm_", "torch_", "deepspeed_")
"""How segments are called that vLLM, torch and DeepSpeed make."""
END_TIMEOUT_S = 10.0


def notes_dir() -> Path:
    """Where this user's runs on this machine keep their notes."""
    return Path(tempfile.gettempdir()) / f"rlver_dist_{os.getuid()}" / "runs"


def folder_prefix(run: Process) -> str:
    """How the names of a run's own folders in shared memory begin."""
    return f"rlver_dist_{run.pid}-{run.start_time}_"


class Notes:
    """What this run has made on this machine so far. Notes that cannot be written are no reason to stop."""

    def __init__(self) -> None:
        self._own = this_process()
        self._path = notes_dir() / f"{self._own.pid}-{self._own.start_time}.json"
        self._processes: set[Process] = set()
        self._segments: set[str] = set()

    def write(self) -> None:
        """Add the processes below this one and the segments that they have mapped.

        What was noted stays: a process whose parent has died is not found below this one any more.
        """
        below = descendants(self._own.pid)
        self._processes |= set(below)
        for each in below:
            self._segments |= {name for name in mapped_shared_memory(each.pid) if _is_segment(name)}
        content = {
            "machine": machine_id(),
            "run": asdict(self._own),
            "processes": [asdict(each) for each in sorted(self._processes)],
            "segments": sorted(self._segments),
        }
        with contextlib.suppress(OSError):
            for folder in (notes_dir().parent, notes_dir()):
                folder.mkdir(exist_ok=True, mode=0o700)
            if _is_ours(notes_dir().parent) and _is_ours(notes_dir()):
                write_whole(self._path, json.dumps(content))

    def remove(self) -> None:
        """Forget the notes, once the run has taken everything down itself."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def remove_leftovers() -> list[str]:
    """End and remove what dead runs have left. Returns a line about each of them that had left anything."""
    # Others could write there what they like, and it would be done in this user's name.
    if not (_is_ours(notes_dir().parent) and _is_ours(notes_dir())):
        return []
    lines = []
    for path in sorted(notes_dir().glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            machine = content["machine"]
            run = Process(**content["run"])
            processes = [Process(**each) for each in content["processes"]]
            segments = [name for name in content["segments"] if _is_segment(name)]
        except (OSError, ValueError, TypeError, KeyError):
            _forget(path)  # cut while it was written, or of another version
            continue
        # Of another machine or container, where a temporary folder is shared: its pids say nothing here.
        if machine != machine_id() or run.alive:
            continue
        ended = _end(processes)
        freed = _remove([*(SHARED_MEMORY / name for name in segments), *_own_folders(run)])
        _forget(path)
        if ended or freed:
            lines.append(
                f"removed what the dead run of pid {run.pid} had left: {ended} processes, {freed} pieces of "
                f"shared memory"
            )
    return lines


def _is_segment(name: str) -> bool:
    return "/" not in name and name.startswith(SEGMENTS)


def _is_ours(folder: Path) -> bool:
    """Whether the folder is there, belongs to this user, and nobody else may write in it."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not others_write


def _own_folders(run: Process) -> list[Path]:
    places = (SHARED_MEMORY, Path(tempfile.gettempdir()))
    return [folder for place in places for folder in place.glob(f"{folder_prefix(run)}*")]


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _end(processes: list[Process]) -> int:
    """Kill those that are still alive, and wait until they are gone, since they hold their segments until
    then."""
    alive = [each for each in processes if each.alive]
    for each in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each.pid, signal.SIGKILL)
    deadline = time.monotonic() + END_TIMEOUT_S
    while any(each.alive for each in alive) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(alive)


def _remove(paths: list[Path]) -> int:
    """Delete those of `paths` that are there, are this user's, and are mapped by no live process."""
    in_use: set[str] = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            in_use |= {name.split("/")[0] for name in mapped_shared_memory(int(entry.name))}
    removed = 0
    for path in paths:
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid() or (path.parent == SHARED_MEMORY and path.name in in_use):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed += 1
    return removed
