"""Processes of this machine by pid and start time, which together name one for good: pids are used again."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = Path("/dev/shm")
STATE, PARENT, START_TIME = 0, 1, 19
"""Fields of /proc/<pid>/stat, counted after the name in brackets (proc_pid_stat(5))."""
_MAPPED = re.compile(rf"{re.escape(str(SHARED_MEMORY))}/(\S+)$")


@dataclass(kw_only=True, slots=True, frozen=True, order=True)
class Process:
    """One process of this machine.

    Attributes:
        pid: its number.
        start_time: clock ticks from the machine's start to its own.
    """

    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; one that has ended and waits for its parent does not."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[START_TIME]) == self.start_time and fields[STATE] != "Z"


def process(pid: int) -> Process | None:
    """The process that has this number now; None where there is none."""
    fields = _stat(pid)
    return None if fields is None else Process(pid=pid, start_time=int(fields[START_TIME]))


def this_process() -> Process:
    """The process that asks."""
    own = process(os.getpid())
    assert own is not None
    return own


def machine_id() -> str:
    """This machine since it was started, and the container whose process numbers are seen here: pid and start
    time name a process only within it."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink(PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def descendants(root: int) -> list[Process]:
    """All processes below `root`, itself left out."""
    children: dict[int, list[Process]] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        fields = _stat(int(entry.name))
        if fields is not None:
            found = Process(pid=int(entry.name), start_time=int(fields[START_TIME]))
            children.setdefault(int(fields[PARENT]), []).append(found)
    below: list[Process] = []
    waiting = [root]
    while waiting:
        found_now = children.pop(waiting.pop(), [])
        below += found_now
        waiting += [each.pid for each in found_now]
    return below


def mapped_shared_memory(pid: int) -> set[str]:
    """Paths below /dev/shm of what the process has mapped; empty where that may not be read."""
    try:
        lines = (PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    found = (_MAPPED.search(line.removesuffix(" (deleted)")) for line in lines)
    return {match.group(1) for match in found if match is not None}


def _stat(pid: int) -> list[str] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in brackets may hold blanks and brackets itself.
    return text.rpartition(")")[2].split()
