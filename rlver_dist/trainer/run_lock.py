"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from rlver_dist.cluster.processes import Process, machine_id, this_process
from rlver_dist.errors import ResourceError

LOCK = "run.lock"
JOB = "SLURM_JOB_ID"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Of file systems without locks, such as Lustre mounted without `flock`."""


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process inside the block; makes the folder, and removes it where the block
    has left it empty.

    The system's own lock on the file ends with the process, so that a run that was killed is not in the way
    of the next one on its machine. On a shared file system the file's text tells of a run on another machine,
    and where a file system knows no locks it has to do alone.

    Raises:
        ResourceError: another run has it; says which and what to do.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    own = this_process()
    told = {
        "machine": machine_id(),
        "host": socket.gethostname(),
        "pid": own.pid,
        "start_time": own.start_time,
        "job": os.environ.get(JOB, ""),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with _locked(output_dir, path) as (file, by_system):
        holder = _holder(path)
        if holder is not None and not _is_gone(holder, told, by_system=by_system):
            raise ResourceError(_taken(output_dir, path, "began"))
        file.truncate(0)
        file.write(json.dumps(told))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, as after every run that began
                output_dir.rmdir()


@contextmanager
def _locked(output_dir: Path, path: Path) -> Iterator[tuple[IO[str], bool]]:
    """The lock file, open, and whether the file system locks it."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            by_system = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceError(_taken(output_dir, path, "runs")) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                by_system = False
            # A run that just ended may have removed the file between our two calls: that lock excludes
            # nobody.
            if _is_at(path, file):
                yield file, by_system
                return
        output_dir.mkdir(parents=True, exist_ok=True)


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _is_gone(holder: dict[str, object], own: dict[str, object], *, by_system: bool) -> bool:
    """Whether the run that the file tells of has ended without removing it."""
    if holder.get("machine") == own["machine"]:
        if by_system:
            return True  # it would hold the lock
        pid, start_time = holder.get("pid"), holder.get("start_time")
        return not (
            isinstance(pid, int)
            and isinstance(start_time, int)
            and Process(pid=pid, start_time=start_time).alive
        )
    # A job that the batch system has started again elsewhere runs nowhere else.
    return bool(own["job"]) and holder.get("job") == own["job"]


def _holder(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _taken(output_dir: Path, path: Path, verb: str) -> str:
    holder = _holder(path) or {}
    who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
    since = holder.get("since", "an unknown time")
    way_out = "use another output_dir, or wait for its end"
    if verb == "began":
        way_out = f"use another output_dir, or delete {path} if that run is dead"
    return f"output_dir={output_dir}: a run {verb} there ({who}, since {since}); {way_out}"
