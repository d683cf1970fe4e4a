"""Models named by a hub id: found in the hub's cache, fetched, or refused in one line."""

from __future__ import annotations

from pathlib import Path

from rlver_dist.errors import DataError

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What is looked at before anything starts; weights come when an actor loads them."""
TIMEOUT_S = 10.0


def hub_folder(repo: str, where: str, *, fetch: bool) -> Path | None:
    """Folder of a hub model's small files in the hub's cache; None where they are not there and `fetch` is
    False.

    Args:
        repo: such as `Qwen/Qwen2.5-7B-Instruct`.
        where: the option and its value, for errors.
        fetch: ask the hub for what the cache lacks.

    Raises:
        DataError: it is neither in the cache nor to be had; says which, and what to do.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo,
            allow_patterns=list(SMALL_FILES),
            ignore_patterns=["*/*"],  # folders beside the model, such as `original/`
            etag_timeout=TIMEOUT_S,
            local_files_only=not fetch,
        )
    except IncompleteSnapshotError as error:
        # Whoever filled the cache had no use for some of the files, and what is used is looked at below.
        folder = error.snapshot_path
    except Exception as error:  # its errors have no common base, and a failed connection is httpx's
        if isinstance(error, LocalEntryNotFoundError) and not fetch:
            return None
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        said = " ".join(str(error).split()).partition(". ")[0][:160]
        raise DataError(
            f"{where}: no such folder, not in {constants.HF_HUB_CACHE}, and not to be had from the hub"
            f"{offline} ({type(error).__name__}: {said}); check the name, or fetch it with: "
            f"hf download {repo}"
        ) from error
    return Path(folder)
