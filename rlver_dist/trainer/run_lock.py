"""One run at a time in an output folder."""

from __future__ import annotations

import fcntl
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rlver_dist.cluster.processes import this_process
from rlver_dist.errors import ResourceError

LOCK = "run.lock"


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process inside the block; creates the folder.

    The file holds host, pid and start time of the run. The system's own lock on it ends with the process, so
    a run that was killed leaves nothing that is in the way on its own host. On a shared file system the text
    tells of a run on another host.

    Raises:
        ResourceError: another run has it; says which and what to do.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(_taken(output_dir, path, "runs")) from None
        holder = _holder(path)
        if holder is not None and holder.get("host") != socket.gethostname():
            raise ResourceError(_taken(output_dir, path, "began"))
        own = this_process()
        file.truncate(0)
        file.write(
            json.dumps(
                {
                    "host": socket.gethostname(),
                    "pid": own.pid,
                    "start_time": own.start_time,
                    "since": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
        )
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


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
