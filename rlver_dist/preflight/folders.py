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
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        # Rights alone do not tell: file systems such as /proc take no files from anybody.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResourceError(
            f"output_dir={output_dir}: nothing can be written in {folder} ({error.strerror}); use "
            f"another folder"
        ) from error
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ResourceError(
            f"keep_checkpoints={keep_checkpoints}: checkpoints and the exported policy take {need / GIB:.1f} "
            f"GiB and {folder} has {free / GIB:.1f} GiB free; keep fewer, or use another output_dir"
        )


def check_resume(resume: str) -> None:
    """Refuse a `resume` that names no checkpoint.

    Raises:
        DataError: says what it may be.
    """
    if resume not in ("auto", "never") and not (Path(resume) / MANIFEST).is_file():
        raise DataError(
            f"resume={resume}: no {MANIFEST} there; use auto, never, or a folder checkpoints/step_<n>"
        )
