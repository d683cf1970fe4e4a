"""`metrics.jsonl`: one JSON object a line and iteration, always written, readable while the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rlver_dist.errors import DataError
from rlver_dist.files import write_whole


class Tracker(Protocol):
    """Where an iteration's reduced metrics go."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Keep one iteration's metrics."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class JsonlTracker:
    """Appends `{"iteration": n, "<key>": value, ...}` lines.

    Standard JSON has no NaN and no infinity: both are written as null, and `progress/non_finite` tells how
    many there were.
    """

    def __init__(self, path: str | Path, *, first_iteration: int) -> None:
        """Open the file for a run whose next iteration is `first_iteration`.

        Lines of that iteration and later ones were written after the checkpoint that the run goes on from:
        they are dropped, since they will be written again.

        Raises:
            DataError: a line is no JSON object with an `iteration`; a last line that was cut short by a crash
                is dropped instead.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [line for line, record in _read_lines(self._path) if record["iteration"] < first_iteration]
            # A kill in the midst of this must not cost the iterations before.
            write_whole(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append one iteration's line in a single write and flush it."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"iteration": iteration, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All lines of a `metrics.jsonl`; a null becomes NaN again.

    Raises:
        DataError: the file is missing, or a line is no JSON object with an `iteration`; a last line that is
            still being written is left out.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; name the metrics.jsonl of a run's output_dir")
    return [
        {key: math.nan if value is None else value for key, value in record.items()}
        for _, record in _read_lines(Path(path))
    ]


def _read_lines(path: Path) -> list[tuple[str, dict]]:
    # A last line without its end is being written, or was cut short by a crash.
    complete = [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    return [(line, _parse(path, number, line)) for number, line in enumerate(complete, start=1)]


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error.msg}); mend or delete the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        raise DataError(f"{path}, line {number}: no whole number under iteration; mend or delete the line")
    return record
