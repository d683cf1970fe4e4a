"""What is looked for before anything starts."""

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
from rlver_dist.preflight.requirements import check_layers, check_memory

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
    return str(tmp_path / "policy"), str(tmp_path / "users")


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
    check_memory(config, "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct", have=8 * GIB)
    check_memory(config, "Qwen/Qwen2.5-7B-Instruct", None, have=2 * GIB)
    with pytest.raises(ResourceError, match=r"^model.path=.*use a smaller model or cluster.kv_cache_gib$"):
        check_memory(config, "Qwen/Qwen2.5-7B-Instruct", None, have=2 * GIB - 1)


def test_layers_that_the_model_lacks_are_named():
    check_layers(resolve(TINY), LoraConfig(), CriticConfig(num_layers=2))
    with pytest.raises(ConfigError, match=r"critic.num_layers=3: the model has 2 layers; use at most that"):
        check_layers(resolve(TINY), LoraConfig(), CriticConfig(num_layers=3))
    check_layers(resolve(TINY), LoraConfig(rank=4, target_modules="q_proj, up_proj"), None)
    with pytest.raises(
        ConfigError,
        match=r"no linear layer 'query' below its head; use all-linear or names among "
        r"down_proj,gate_proj,k_proj,o_proj,q_proj",
    ):
        check_layers(resolve(TINY), LoraConfig(rank=4, target_modules="q_proj,query"), None)
    check_layers("Qwen/Qwen2.5-7B-Instruct", LoraConfig(rank=4, target_modules="query"), None)
