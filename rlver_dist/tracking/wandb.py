"""Weights & Biases as a tracker; the only module that imports `wandb`, and only once it is used.

A tracker that is configured and does not start is an error, so that nobody finds an empty project after a
night. Once it runs, tracking is never worth a run: a failure to log warns once and `metrics.jsonl` goes on.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlver_dist.config.enums import WandbMode
from rlver_dist.config.tracking import TrackingConfig
from rlver_dist.errors import UserError
from rlver_dist.tracking.metrics import Summary

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"
DEFAULT_URL = "https://api.wandb.ai"
FINISH_TIMEOUT_S = 300.0
"""Longest wait for an upload at the end; what is left stays in `wandb/` for `wandb sync`."""
WAY_OUT = "set tracking.wandb=offline (sync later with `wandb sync`) or tracking.wandb=disabled"


class WandbTracker:
    """Logs each iteration to one W&B run, which `start_wandb` started."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._warned = False

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Log one iteration's metrics at step `iteration`; warns once where that fails.

        W&B's steps only rise: iterations that are repeated after a resume keep their first values there.
        """
        self._attempt("log", lambda: self._run.log(dict(metrics), step=iteration))

    def summarize(self, summary: Summary) -> None:
        """Put the run's results (`summary.json`) into the run's summary."""
        self._attempt(
            "summarize",
            lambda: self._run.summary.update({f"eval/{key}": value for key, value in summary.items()}),
        )

    def close(self) -> None:
        """End the run: upload or write what is left."""
        self._attempt("finish", self._run.finish)

    def _attempt(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            # Once: a network that is gone would otherwise print a line an iteration all night.
            if not self._warned:
                logger.warning(
                    "W&B %s failed (%s: %s); the run goes on, metrics.jsonl has everything",
                    what,
                    type(error).__name__,
                    error,
                )
            self._warned = True


def start_wandb(
    tracking: TrackingConfig, output_dir: str | Path, run_config: dict[str, object]
) -> WandbTracker | None:
    """Start, or after an interruption continue, the W&B run of `output_dir`; None where W&B is disabled.

    Files go to `output_dir/wandb/`. The run's id is kept in `output_dir/wandb_id`, so that a resumed run is
    the same one.

    Args:
        tracking: mode, project and name.
        output_dir: the run's folder.
        run_config: the resolved configuration, JSON-able, shown beside the run.

    Raises:
        UserError: W&B did not start.
    """
    mode = resolve_mode(tracking.wandb)
    if mode is WandbMode.disabled:
        return None
    if mode is WandbMode.online and not has_login():
        raise UserError(
            f"tracking.wandb=online: no API key; run `wandb login`, set WANDB_API_KEY, or {WAY_OUT}"
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import wandb

        run = wandb.init(
            project=tracking.project,
            name=tracking.name or folder.resolve().name,
            dir=str(folder),
            id=_run_id(folder),
            # Offline, a second part of a run is a folder of its own and `wandb sync` joins them by the id.
            resume="allow" if mode is WandbMode.online else None,
            mode=mode.value,
            # Through JSON, or W&B would show an enum's member as its repr.
            config=json.loads(json.dumps(run_config)),
            # W&B would otherwise wrap the terminal that the progress bars draw on.
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH_TIMEOUT_S),
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(
            f"tracking.wandb={mode.value}: W&B did not start ({type(error).__name__}: {reason}); {WAY_OUT}"
        ) from error
    return WandbTracker(run)


def resolve_mode(mode: WandbMode) -> WandbMode:
    """What `auto` stands for: `WANDB_MODE` where set, else online with a login, else offline; other modes are
    as they are."""
    if mode is not WandbMode.auto:
        return mode
    asked = os.environ.get("WANDB_MODE", "")
    if asked:
        if asked not in (WandbMode.online, WandbMode.offline, WandbMode.disabled):
            raise UserError(f"WANDB_MODE={asked}: use online, offline or disabled, or set tracking.wandb")
        return WandbMode(asked)
    return WandbMode.online if has_login() else WandbMode.offline


def has_login() -> bool:
    """True where `WANDB_API_KEY` is set or the netrc file has a login for W&B's host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or DEFAULT_URL).hostname or ""
    # Where `wandb login` writes the key.
    candidates = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    return any(_netrc_has(Path(name).expanduser(), host) for name in candidates if name)


def _netrc_has(path: Path, host: str) -> bool:
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    # Chosen here and not by W&B, which would take a resumed run for a new one.
    path = folder / ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
    return path.read_text(encoding="ascii").strip()
