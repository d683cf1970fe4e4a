"""Files and folders that are complete or absent: written beside their place, then renamed into it.

A rename on one file system is atomic, so that a reader, or a run that starts after a kill, finds the old
content or the new one and never a part of either.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path to write to, in an existing folder; at the end of the block that file replaces `path`.

    If the block raises, `path` stays as it was and what was written is deleted. A kill leaves `<name>.tmp`,
    which the next write of the same file replaces.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8; see `whole_file` for what a failure leaves."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it replaces the folder `path`.

    If the block raises, `path` stays as it was and what was written is deleted. A kill leaves `<name>.tmp`,
    which the next write of the same folder deletes; between deleting the old folder and the rename it leaves
    no `path` at all. One process at a time may write a folder; see `new_folder` for several.
    """
    aside = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    # A network file system may refuse to delete a file that somebody still reads: write over the rest.
    aside.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        # Unlike a file, a folder with content cannot be renamed over.
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`, which must not exist before.

    Several processes may do so at once: each fills a folder under a name of its own, and the first to finish
    wins.

    Raises:
        OSError: another process was faster; its folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
    try:
        yield aside
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
