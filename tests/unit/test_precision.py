"""Which number format a run takes on which processor."""

import os
import subprocess
import sys

import pytest

from rlver_dist.config import precision
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device, Precision, SimulatorBackend
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.precision import OVERRIDE, cpu_has_bfloat16, with_precision
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.errors import ConfigError
from tests.timing import hang_limit

CPU = ClusterConfig(device=Device.cpu, engines=1, learner_ranks=1)
AVX2 = "flags\t\t: fpu sse2 fma avx2 f16c\n"


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
    """Writes what Linux would say of the processor."""
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    return (tmp_path / "cpuinfo").write_text


@pytest.mark.parametrize(
    ("said", "has"),
    [
        (f"processor\t: 0\n{AVX2}", False),
        (AVX2.replace("f16c", "avx512f avx512_bf16"), True),
        (AVX2.replace("f16c", "amx_tile amx_bf16"), True),
        # Names that only begin alike, and a processor's name, are no instructions.
        (f"model name\t: avx512_bf16\n{AVX2.replace('f16c', 'avx512_bf16x')}", False),
        ("", False),
    ],
)
def test_instructions_are_read_off_the_processors_flags(cpu_info, said, has):
    cpu_info(said)
    assert cpu_has_bfloat16() is has


def test_a_machine_without_linuxs_list_has_none(cpu_info):
    assert cpu_has_bfloat16() is False


def test_a_variable_forces_either_answer(cpu_info, monkeypatch):
    cpu_info(AVX2)
    monkeypatch.setenv(OVERRIDE, "1")
    assert cpu_has_bfloat16() is True
    monkeypatch.setenv(OVERRIDE, "yes")
    with pytest.raises(ConfigError, match=rf"^{OVERRIDE}=yes: use 0 or 1"):
        cpu_has_bfloat16()


@pytest.mark.parametrize(
    ("has", "cluster", "asked", "given"),
    [
        ("0", CPU, Precision.auto, Precision.float32),
        ("1", CPU, Precision.auto, Precision.bfloat16),
        ("0", ClusterConfig(), Precision.auto, Precision.bfloat16),
        ("0", CPU, Precision.bfloat16, Precision.bfloat16),
        ("1", CPU, Precision.float32, Precision.float32),
    ],
)
def test_policy_and_users_take_the_same_rule(monkeypatch, has, cluster, asked, given):
    monkeypatch.setenv(OVERRIDE, has)
    users = SimulatorConfig(backend=SimulatorBackend.vllm, engine=UserEngineConfig(dtype=asked))
    config, _ = with_precision(RunConfig(model=ModelConfig(dtype=asked), simulator=users, cluster=cluster))
    assert (config.model.dtype, config.simulator.engine.dtype) == (given, given)
    # What is saved, and what a resume compares, is the format itself.
    assert config.resume_fingerprint["model.dtype"] == given.value


@pytest.mark.parametrize(
    ("has", "asked", "words"),
    [
        ("0", Precision.auto, "model.dtype=float32, chosen since this CPU has no bfloat16 instructions"),
        ("1", Precision.auto, "model.dtype=bfloat16, chosen since this CPU has instructions for it"),
        ("0", Precision.bfloat16, "warning: model.dtype=bfloat16: this CPU has no bfloat16 instructions"),
        ("0", Precision.float32, None),
        ("1", Precision.bfloat16, None),
    ],
)
def test_what_was_chosen_or_costs_is_said_once(monkeypatch, has, asked, words):
    monkeypatch.setenv(OVERRIDE, has)
    _, notices = with_precision(RunConfig(model=ModelConfig(dtype=asked), cluster=CPU))
    assert len(notices) == (words is not None)
    assert words is None or notices[0].startswith(words)


def test_gpus_are_not_commented_on(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "0")
    assert with_precision(RunConfig(model=ModelConfig(dtype=Precision.bfloat16)))[1] == []


def test_without_zero_auto_is_refused_since_it_may_be_bfloat16():
    with pytest.raises(ConfigError, match=r"^learner.zero_stage=0: .*model.dtype=float32"):
        RunConfig(learner=LearnerConfig(zero_stage=0))


@pytest.mark.parametrize(("has", "dtype"), [("0", "float32"), ("1", "bfloat16")])
def test_check_says_the_format_that_the_run_would_take(has, dtype):
    command = [sys.executable, "-m", "rlver_dist.launch", "+exp=ppo_think", "+on=cpu", "check=true"]
    done = subprocess.run(
        command,
        env={**os.environ, OVERRIDE: has},
        capture_output=True,
        text=True,
        timeout=hang_limit(120),
        check=True,
    )
    assert f"model.dtype={dtype}, chosen since this CPU has" in done.stdout
    assert f"smollm2-135m-instruct ({dtype})" in done.stdout
