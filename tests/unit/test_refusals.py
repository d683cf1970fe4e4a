"""What is looked for before anything starts."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rlver_dist.bundled_models import TINY, resolve
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.cluster import GIB, ClusterConfig
from rlver_dist.config.enums import AlgorithmName, CriticTrunk, Precision, SimulatorBackend
from rlver_dist.config.learner import CriticConfig, LearnerConfig
from rlver_dist.config.model import LoraConfig, ModelConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.errors import ConfigError, ResourceError
from rlver_dist.preflight.folders import check_output_dir
from rlver_dist.preflight.model_folder import read_folder
from rlver_dist.preflight.requirements import check_layers, check_memory
from tests.timing import hang_limit

PPO = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1)
CPU = ClusterConfig(engines=1, learner_ranks=1, kv_cache_gib=2)
USERS = SimulatorConfig(
    backend=SimulatorBackend.vllm,
    engine=UserEngineConfig(engines=2, kv_cache_gib=3, dtype=Precision.bfloat16),
)
MILLION = 10**6


@pytest.fixture
def folders(tmp_path):
    """A policy of a million numbers, a quarter in each of two layers, the embeddings and the head; users of
    three millions in two files."""
    quarter = torch.zeros(MILLION // 4)
    layers = {f"model.layers.{number}.q.weight": quarter.clone() for number in range(2)}
    files = {
        "policy": [
            {"model.embed_tokens.weight": quarter.clone(), "lm_head.weight": quarter.clone(), **layers}
        ],
        "users": [{"a": torch.zeros(MILLION)}, {"b": torch.zeros(2 * MILLION)}],
    }
    for name, tensors in files.items():
        (tmp_path / name).mkdir()
        for index, content in enumerate(tensors):
            save_file(content, tmp_path / name / f"model-{index}.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    return [read_folder(tmp_path / name, f"model.path={name}") for name in files]


@pytest.mark.parametrize(
    ("changes", "engine", "learners"),
    [
        # Weights; and gradient and two moments of each in float32.
        ({}, 4, 4 + 12),
        # In bfloat16, whatever the file holds, there is a float32 copy, too.
        ({"model": ModelConfig(dtype=Precision.bfloat16), "learner": LearnerConfig(zero_stage=1)}, 2, 2 + 16),
        ({"algorithm": AlgorithmConfig(group_size=2, kl_coef=0.1)}, 4, 2 * 4 + 12),
        ({"model": ModelConfig(dtype=Precision.float32, lora=LoraConfig(rank=4))}, 4, 4),
        ({"algorithm": PPO}, 4, 2 * (4 + 12)),
        ({"algorithm": PPO, "critic": CriticConfig(trunk=CriticTrunk.frozen)}, 4, 2 * 4 + 12),
        # One of two layers and no head: half of it.
        ({"algorithm": PPO, "critic": CriticConfig(num_layers=1)}, 4, 1.5 * (4 + 12)),
    ],
)
def test_memory_of_all_engines_and_learners_is_added_up(folders, changes, engine, learners):
    config = RunConfig(
        **{"model": ModelConfig(dtype=Precision.float32), "cluster": CPU, "simulator": USERS, **changes}
    )
    need = 2 * GIB + 2 * 3 * GIB + int((engine + learners + 2 * 3 * 2) * MILLION)
    check_memory(config, *folders, have=need)
    needs = "engines 2.0, learners 0.0, users' engines 6.0"
    with pytest.raises(
        ResourceError,
        match=rf"^simulator.engine.model=.* need 8.0 GiB of memory \({needs}\) and this machine",
    ):
        check_memory(config, *folders, have=need - 1)


def test_models_of_unknown_size_count_as_their_caches(folders):
    config = RunConfig(model=ModelConfig(dtype=Precision.bfloat16), cluster=CPU, simulator=USERS)
    check_memory(config, None, None, have=8 * GIB)
    alone = replace(config, simulator=SimulatorConfig())
    check_memory(alone, None, None, have=2 * GIB)
    with pytest.raises(ResourceError, match=r"^model.path=.*use a smaller model or cluster.kv_cache_gib$"):
        check_memory(alone, None, None, have=2 * GIB - 1)


def test_layers_that_the_model_lacks_are_named():
    tiny = read_folder(Path(resolve(TINY)), "model.path=tiny-random")
    check_layers(tiny, LoraConfig(), CriticConfig(num_layers=2))
    with pytest.raises(ConfigError, match=r"critic.num_layers=3: the model has 2 layers; use at most that"):
        check_layers(tiny, LoraConfig(), CriticConfig(num_layers=3))
    check_layers(tiny, LoraConfig(rank=4, target_modules="q_proj, up_proj"), None)
    with pytest.raises(
        ConfigError,
        match=r"no linear layer 'query' below its head; use all-linear or names among "
        r"down_proj,gate_proj,k_proj,o_proj,q_proj",
    ):
        check_layers(tiny, LoraConfig(rank=4, target_modules="q_proj,query"), None)
    check_layers(replace(tiny, shapes={}), LoraConfig(rank=4, target_modules="query"), None)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("output_dir=/proc/x", "output_dir=/proc/x: nothing can be written there"),
        ("output_dir={file}/run", "nothing can be written there"),
        ("resume=/nope", "resume=/nope: no manifest.json there"),
        ("model.path=./none", "model.path=./none: no config.json in that folder"),
        ("model.path=nowhere/none", "model.path=nowhere/none: no such folder, not in"),
        (
            "model.max_context_tokens=256 rollout.max_reply_tokens=200",
            "tokens and a reply up to 200, so no dialogue would have a turn; use",
        ),
        (
            "model.max_context_tokens=99999",
            "model.max_context_tokens=99999: model.path=tiny-random has positions",
        ),
    ],
)
def test_a_start_is_refused_before_ray_in_one_line(tmp_path, override, line):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "rlver_dist.launch", "+exp=grpo_no_think", "+on=tiny"]
    done = subprocess.run(
        [*command, *override.format(file=tmp_path / "file").split()],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=hang_limit(60),
        check=False,
    )
    refusal = done.stderr.splitlines()
    assert done.returncode == 2 and len(refusal) == 1 and line in refusal[0], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_disk_that_cannot_hold_the_checkpoints_is_refused(tmp_path):
    check_output_dir(str(tmp_path / "new" / "run"), 1, 2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        ResourceError, match=r"^keep_checkpoints=2: .* take 1048576.0 GiB and .* has room for .*; keep few"
    ):
        check_output_dir(str(tmp_path), 2**50, 2)


def test_what_a_run_has_written_is_room_for_what_it_writes_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_1" / "state").write_bytes(bytes(50))
    check_output_dir(str(tmp_path), 150, 1)
    with pytest.raises(ResourceError, match="keep_checkpoints=1"):
        check_output_dir(str(tmp_path), 151, 1)
