"""Cores and memory that this process may use, which a container or a batch system may have made fewer than
the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores by the process's affinity and its cgroups' quotas, rounded up; at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _own_folders("cpu"):
        cores = min(cores, _quota(folder))
    return max(1, math.ceil(cores))


def available_memory() -> int:
    """Bytes of memory by the machine and the process's cgroups."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _own_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            memory = min(memory, _number(folder / name) or memory)
    return memory


def _own_folders(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of those that it is in, with limits on `controller`.

    Each limit holds for everything below it. A line of /proc/self/cgroup is `id:controllers:path`; version 2
    has no controllers there and one tree for all (cgroups(7)).
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 has a link by each controller's own name, whatever the order of names in the line.
        root = CGROUPS / controller if controllers else CGROUPS
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):
            yield root / folder


def _quota(folder: Path) -> float:
    """Cores that a cgroup may keep busy; infinite without a quota."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()  # version 2
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us = _number(folder / "cpu.cfs_quota_us")  # version 1, -1 without one
        period_us = _number(folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and period_us else math.inf


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or no number above 0 in it, such as `max`."""
    try:
        value = int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if value > 0 else None
