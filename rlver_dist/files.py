"""Text files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` aside, as UTF-8, and rename it to `path`, so that nobody ever finds a part of it."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)
