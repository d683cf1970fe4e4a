"""The record of a build: one JSON line a call, appended and forced to disk, from which an interrupted build
goes on.

The first line says what is being built. A last line that an interruption cut short is dropped on opening.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlver_dist.errors import DataError, boundary
from rlver_dist.persona_synthesis.schema import Fields

Row = dict[str, Any]
"""A line of the journal, as JSON holds it."""
ACCEPTED = "accepted"


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """One call.

    Attributes:
        slot: the persona's id.
        step: "person" or "scene".
        verdict: `ACCEPTED`, or the reason of the rejection.
        detail: one line on a rejection; empty for an accepted answer.
        content: the fields of an accepted answer, else None.
        prompt_tokens: tokens of the prompt; this and the next three are 0 where the call failed.
        cached_tokens: those of them from a prefix cache.
        completion_tokens: tokens of the answer.
        seconds: from the call to the answer.
        model: what answered; empty where the call failed.
    """

    slot: str
    step: str
    verdict: str
    detail: str
    content: Fields | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    model: str = ""


class Journal:
    """An open record; one build at a time can have it open."""

    def __init__(self, path: Path, header: Row) -> None:
        """Open or create.

        Raises:
            DataError: another build has it open, it belongs to another plan, or a line of it is damaged.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self.entries: list[Entry] = []
        """Calls of earlier builds and of this one, in order."""
        try:
            self._lock()
            lines = self._whole_lines()
            if lines:
                self._check_header(self._row(lines[0], 1), header)
                self.entries = [self._entry(line, number) for number, line in enumerate(lines[1:], start=2)]
            else:
                self._write(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, entry: Entry) -> None:
        """Add a call; it is on disk when this returns."""
        self._write(asdict(entry))
        self.entries.append(entry)

    def _write(self, row: Row) -> None:
        with boundary(str(self._path)):
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            self._file.flush()
            # Answers cost money: what is paid for has to survive a crash of the machine as well.
            os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{self._path}: another build is writing there; wait for it, or use another --out"
            ) from error

    def _whole_lines(self) -> list[bytes]:
        self._file.seek(0)
        content = self._file.read()
        # A line that an interruption cut short is cut off the file, too, or the next one would go on in it.
        end = content.rfind(b"\n") + 1
        self._file.truncate(end)
        return content[:end].split(b"\n")[:-1]

    def _check_header(self, held: Row, wanted: Row) -> None:
        for key in wanted | held:
            if held.get(key) != wanted.get(key):
                raise DataError(
                    f"{self._path}: holds a build with {key}={held.get(key)}, not {wanted.get(key)}; use "
                    f"another --out, or the same options"
                )

    def _row(self, line: bytes, number: int) -> Row:
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{self._path}:{number}: damaged; remove the line to have that call made again"
            ) from error

    def _entry(self, line: bytes, number: int) -> Entry:
        row = self._row(line, number)
        try:
            return Entry(**row)
        except TypeError as error:
            raise DataError(
                f"{self._path}:{number}: not a call of a build ({error}); use another --out"
            ) from error
