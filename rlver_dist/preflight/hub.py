"""Models named by a hub id: had from the cache or the hub, or refused in one line."""

from __future__ import annotations

from pathlib import Path

from rlver_dist.errors import DataError

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""What is looked at before anything starts; weights come when an actor loads them."""
TIMEOUT_S = 10.0


def hub_folder(repo: str, key: str) -> tuple[Path, bool]:
    """Folder of a hub model's small files in the hub's cache, and whether its weights are there, too.

    Args:
        repo: such as `Qwen/Qwen2.5-7B-Instruct`.
        key: the option that names it.

    Raises:
        DataError: it is neither in the cache nor to be had; says which, and what to do.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(
            snapshot_download(repo, allow_patterns=list(SMALL_FILES), etag_timeout=TIMEOUT_S, max_workers=2)
        )
    except Exception as error:  # its errors have no common base, and a failed connection is httpx's
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        said = " ".join(str(error).split()).partition(". ")[0][:160]
        raise DataError(
            f"{key}={repo}: not in {constants.HF_HUB_CACHE} and not to be had from the hub{offline} "
            f"({type(error).__name__}: {said}); check the id, fetch it with: hf download {repo}, or name a "
            f"folder"
        ) from error
    return folder, any(folder.glob("*.safetensors"))
