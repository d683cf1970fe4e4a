"""One run at a time in a folder, and what dead runs leave is removed; with real processes."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlver_dist.cluster import leftovers
from rlver_dist.cluster.processes import (
    SHARED_MEMORY,
    Process,
    descendants,
    machine_id,
    process,
    this_process,
)
from rlver_dist.errors import ResourceError
from rlver_dist.trainer.run_lock import LOCK, run_lock

HOLD = (
    "import sys, time; from pathlib import Path; from rlver_dist.trainer.run_lock import run_lock\n"
    "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / 'run'`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path, holder):
    with (
        pytest.raises(
            ResourceError, match=rf"a run runs there \(pid {holder.pid} on .*\); use another output"
        ),
        run_lock(tmp_path / "run"),
    ):
        pass


def test_a_killed_run_is_not_in_the_way(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == holder.pid
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists()


def test_a_folder_with_anything_in_it_stays(tmp_path):
    with run_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("x")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_run_of_another_host_is_taken_at_its_word(tmp_path):
    told = {"machine": "other", "host": "elsewhere", "pid": 7, "since": "2026-01-01", "job": "12"}
    (tmp_path / LOCK).write_text(json.dumps(told))
    with (
        pytest.raises(
            ResourceError, match=r"pid 7 on elsewhere, since 2026-01-01\).*or delete .*run.lock if"
        ),
        run_lock(tmp_path),
    ):
        pass
    assert "elsewhere" in (tmp_path / LOCK).read_text()


def test_a_job_that_was_started_again_elsewhere_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    told = {"machine": "other", "host": "elsewhere", "pid": 7, "since": "2026-01-01", "job": "12"}
    (tmp_path / LOCK).write_text(json.dumps(told))
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_of_the_file_system_the_text_tells(tmp_path, monkeypatch, alive):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    own = this_process()
    told = {"machine": machine_id(), "pid": own.pid, "start_time": own.start_time - (not alive)}
    (tmp_path / LOCK).write_text(json.dumps(told))
    if not alive:
        with run_lock(tmp_path):
            pass
        return
    with pytest.raises(ResourceError, match=f"a run began there \\(pid {own.pid} on"), run_lock(tmp_path):
        pass


def test_a_process_is_known_by_number_and_start():
    own = this_process()
    assert own.alive and process(own.pid) == own
    assert not Process(pid=own.pid, start_time=own.start_time - 1).alive
    with subprocess.Popen(["sleep", "60"]) as child:
        found = process(child.pid)
        assert found in descendants(own.pid)
        child.kill()
        child.wait()
    assert found is not None and not found.alive


ORPHANS = (
    "import mmap, os, subprocess, sys, time; from pathlib import Path\n"
    "from rlver_dist.cluster.leftovers import Notes, folder_prefix\n"
    "from rlver_dist.cluster.processes import this_process\n"
    "keep = 'import mmap, sys, time; file = open(sys.argv[1], \"r+b\"); '\n"
    "keep += 'held = mmap.mmap(file.fileno(), 0); print(1, flush=True); time.sleep(600)'\n"
    "child = subprocess.Popen([sys.executable, '-c', keep, sys.argv[1]], stdout=subprocess.PIPE)\n"
    "child.stdout.readline(); Notes().write()\n"
    "(Path(sys.argv[2]) / f'{folder_prefix(this_process())}x').mkdir()\n"
    "print(child.pid, flush=True); time.sleep(600)\n"
)


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    segment = SHARED_MEMORY / f"psm_test_{os.getpid()}"
    stranger = SHARED_MEMORY / f"psm_stranger_{os.getpid()}"
    strange_folder = tmp_path / "rlver_dist_1-2_x"
    strange_folder.mkdir()
    for path in (segment, stranger):
        path.write_bytes(bytes(4096))
    try:
        command = [sys.executable, "-c", ORPHANS, str(segment), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            orphan = process(int(run.stdout.readline()))
            assert orphan is not None and leftovers.remove_leftovers() == []  # it still runs
            run.send_signal(signal.SIGKILL)
        assert orphan.alive and segment.exists()
        [line] = leftovers.remove_leftovers()
        assert line.endswith("had left: 1 processes, 2 pieces of shared memory")
        for _ in range(100):
            if not orphan.alive:
                break
            time.sleep(0.1)
        assert not orphan.alive and not segment.exists() and stranger.exists()
        assert list(tmp_path.glob("rlver_dist_*_x")) == [strange_folder]
        assert leftovers.remove_leftovers() == [] and list(leftovers.notes_dir().iterdir()) == []
    finally:
        for path in (segment, stranger):
            path.unlink(missing_ok=True)


def test_notes_that_cannot_be_read_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    for folder in (leftovers.notes_dir().parent, leftovers.notes_dir()):
        folder.mkdir(mode=0o700)
    (leftovers.notes_dir() / "1-2.json").write_text("{")
    assert leftovers.remove_leftovers() == [] and list(Path(leftovers.notes_dir()).iterdir()) == []


@pytest.mark.parametrize("unsafe", ["another_machine", "writable_by_others"])
def test_notes_of_elsewhere_or_that_others_may_write_are_left_alone(tmp_path, monkeypatch, unsafe):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    leftovers.Notes().write()
    [path] = leftovers.notes_dir().iterdir()
    dead = json.loads(path.read_text()) | {"run": {"pid": 1, "start_time": 1}}
    if unsafe == "another_machine":
        dead["machine"] = "other"
    else:
        leftovers.notes_dir().chmod(0o777)
    path.write_text(json.dumps(dead))
    folder = tmp_path / f"{leftovers.folder_prefix(Process(pid=1, start_time=1))}x"
    folder.mkdir()
    assert leftovers.remove_leftovers() == [] and folder.exists() and path.exists()
    leftovers.notes_dir().chmod(0o700)
    path.write_text(json.dumps(dead | {"machine": machine_id()}))
    assert len(leftovers.remove_leftovers()) == 1 and not folder.exists()


def test_what_the_user_keeps_in_shared_memory_is_never_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(leftovers.tempfile, "tempdir", None)
    kept = SHARED_MEMORY / f"model_{os.getpid()}.safetensors"
    kept.write_bytes(bytes(4096))
    program = (
        "import mmap, sys, time; file = open(sys.argv[1], 'r+b'); held = mmap.mmap(file.fileno(), 0); "
        "print(1, flush=True); time.sleep(600)"
    )
    try:
        with subprocess.Popen([sys.executable, "-c", program, str(kept)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            leftovers.Notes().write()
            child.kill()
        [path] = leftovers.notes_dir().iterdir()
        assert json.loads(path.read_text())["segments"] == []
    finally:
        kept.unlink()
