"""Where a run writes, tried before anything starts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rlver_dist.config.cluster import GIB
from rlver_dist.errors import DataError, ResourceError

MANIFEST = "manifest.json"


def check_output_dir(output_dir: str, need: int, keep_checkpoints: int) -> None:
    """Refuse a folder that cannot be written, or a disk without room for what a run keeps.

    Args:
        output_dir: the option.
        need: bytes of the checkpoints that are kept at a time, and of the exported policy.
        keep_checkpoints: the option, for the error.

    Raises:
        ResourceError: says what is in the way.
    """
    output = Path(output_dir).absolute()
    try:
        folder = output
        while not folder.exists():
            folder = folder.parent
        # Rights alone do not tell: file systems such as /proc take no files from anybody.
        with tempfile.TemporaryFile(dir=folder):
            pass
        # What an earlier start of this run has written is written over.
        free = shutil.disk_usage(folder).free + _size(output / "checkpoints") + _size(output / "policy")
    except OSError as error:
        raise ResourceError(
            f"output_dir={output_dir}: nothing can be written there ({error.strerror}: {error.filename}); "
            f"use another folder"
        ) from error
    if need > free:
        raise ResourceError(
            f"keep_checkpoints={keep_checkpoints}: checkpoints and the exported policy take {need / GIB:.1f} "
            f"GiB and {output} has room for {free / GIB:.1f} GiB; keep fewer, or use another output_dir"
        )


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, which need not be there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_resume(resume: str) -> None:
    """Refuse a `resume` that names no checkpoint.

    Raises:
        DataError: says what it may be.
    """
    if resume not in ("auto", "never") and not (Path(resume) / MANIFEST).is_file():
        raise DataError(
            f"resume={resume}: no {MANIFEST} there; use auto, never, or a folder checkpoints/step_<n>"
        )
