"""Weights & Biases in its offline mode, as it really runs: files, no network."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlver_dist.config.enums import WandbMode
from rlver_dist.config.tracking import TrackingConfig
from rlver_dist.errors import UserError
from rlver_dist.tracking.wandb import has_login, resolve_mode, start_wandb


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_DIR",
        "WANDB_RUN_ID",
        "WANDB_PROJECT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def contains_soon(path: Path, content: bytes, seconds: float = 20.0) -> bool:
    """W&B's own process may write the file's end a moment after the run is closed."""
    deadline = time.monotonic() + seconds
    while content not in path.read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_offline_writes_files_warns_once_and_resumes_its_id(tmp_path, caplog):
    output_dir = tmp_path / "run"
    tracking = TrackingConfig(wandb=WandbMode.auto)
    tracker = start_wandb(tracking, output_dir, {"seed": 1, "learner": {"lr": 1e-6}})
    assert tracker is not None
    tracker.log(1, {"reward/mean": 0.5, "learner/loss": float("nan")})
    tracker.summarize({"before": 41.2, "interval95": [2.1, 8.0], "second_appraiser": {"before": 40.0}})
    tracker.close()
    run_id = (output_dir / "wandb_id").read_text().strip()
    (recorded,) = output_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    assert contains_soon(recorded, b"reward/mean")
    assert not caplog.records
    tracker.log(2, {"reward/mean": 0.6})
    tracker.log(3, {"reward/mean": 0.7})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the run goes on" in caplog.text
    again = start_wandb(tracking, output_dir, {})
    assert again is not None
    again.close()
    assert (output_dir / "wandb_id").read_text().strip() == run_id
    # W&B numbers the second folder where both were made within one second.
    named = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{run_id}(-\d+)?")
    assert all(named.fullmatch(folder.name) for folder in (output_dir / "wandb").glob("offline-run-*"))


def test_a_start_that_fails_is_an_error_of_one_line(tmp_path):
    with pytest.raises(
        UserError, match=r"tracking\.wandb=offline: W&B did not start .*tracking\.wandb=disabled"
    ) as raised:
        start_wandb(TrackingConfig(wandb=WandbMode.offline, project="no/slashes"), tmp_path / "run", {})
    assert "\n" not in str(raised.value)


def test_online_without_a_key_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"tracking\.wandb=online: no API key; run `wandb login`"):
        start_wandb(TrackingConfig(wandb=WandbMode.online), tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_disabled_writes_nothing(tmp_path):
    assert start_wandb(TrackingConfig(wandb=WandbMode.disabled), tmp_path / "run", {}) is None
    assert not (tmp_path / "run").exists()


def test_auto_follows_key_netrc_and_environment(monkeypatch, no_login):
    assert resolve_mode(WandbMode.auto) is WandbMode.offline
    no_login.write_text("machine example.org login user password secret\n")
    assert not has_login()
    no_login.write_text("machine api.wandb.ai login user password secret\n")
    assert resolve_mode(WandbMode.auto) is WandbMode.online
    assert resolve_mode(WandbMode.disabled) is WandbMode.disabled
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert resolve_mode(WandbMode.auto) is WandbMode.online
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(WandbMode.auto) is WandbMode.disabled
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes: use online, offline or disabled"):
        resolve_mode(WandbMode.auto)


def test_wandb_is_imported_only_when_it_is_used():
    code = "import sys, rlver_dist.tracking.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
