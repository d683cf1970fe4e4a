"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from rlver_dist.cluster.processes import this_process
from rlver_dist.errors import ResourceError

LOCK = "run.lock"


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process inside the block; makes the folder, and removes it where the block
    has left it empty.

    The file holds host, pid and start time of the run. The system's own lock on it ends with the process, so
    a run that was killed leaves nothing that is in the way on its own host. On a shared file system the text
    tells of a run on another host.

    Raises:
        ResourceError: another run has it; says which and what to do.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    with _locked(output_dir, path) as file:
        holder = _holder(path)
        if holder is not None and holder.get("host") != socket.gethostname():
            raise ResourceError(_taken(output_dir, path, "began"))
        own = this_process()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"host": socket.gethostname(), "pid": own.pid, "start_time": own.start_time, "since": now}
        file.truncate(0)
        file.write(json.dumps(told))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty, as after every run that began
                output_dir.rmdir()


def _locked(output_dir: Path, path: Path) -> IO[str]:
    """The lock file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ResourceError(_taken(output_dir, path, "runs")) from None
        # A run that just ended may have removed the file between our two calls: that lock excludes nobody.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()
        output_dir.mkdir(parents=True, exist_ok=True)


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
