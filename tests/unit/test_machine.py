"""Cores and memory of a process, read from cgroup folders made here."""

import os

import pytest

from rlver_dist.config import machine

HAVE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
CORES = len(os.sched_getaffinity(0))
MIB = 2**20


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A function that says in which groups this process is, and writes their files."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")

    def write(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "fs" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_groups_the_machine_counts(cgroups):
    assert (machine.available_cores(), machine.available_memory()) == (CORES, HAVE)
    cgroups("0::/\n")
    assert (machine.available_cores(), machine.available_memory()) == (CORES, HAVE)


def test_version_2_limits_hold_for_all_below(cgroups):
    cgroups(
        "0::/job/step\n",
        job__step__cpu_DOT_max="max 100000\n",
        job__cpu_DOT_max="50000 100000\n",
        job__memory_DOT_max=f"{512 * MIB}\n",
        job__step__memory_DOT_max="max\n",
    )
    assert (machine.available_cores(), machine.available_memory()) == (1, 512 * MIB)


def test_version_1_limits_are_read(cgroups):
    cgroups(
        "4:memory:/box\n3:cpu,cpuacct:/box\n",
        memory__box__memory_DOT_limit_in_bytes=f"{256 * MIB}\n",
        cpu__box__cpu_DOT_cfs_quota_us="20000\n",
        cpu__box__cpu_DOT_cfs_period_us="100000\n",
    )
    assert (machine.available_cores(), machine.available_memory()) == (1, 256 * MIB)


def test_a_larger_limit_than_the_machine_changes_nothing(cgroups):
    cgroups("0::/a\n", a__memory_DOT_max=str(2 * HAVE), a__cpu_DOT_max=f"{100000 * (CORES + 3)} 100000")
    assert (machine.available_cores(), machine.available_memory()) == (CORES, HAVE)


def test_affinity_counts(cgroups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert machine.available_cores() == 1
