"""What is looked for before anything starts."""

import pytest
import torch
from safetensors.torch import save_file

from rlver_dist.choices import AlgorithmName, CriticTrunk, Precision, SimulatorBackend
from rlver_dist.config import ClusterConfig, RunConfig
from rlver_dist.errors import ConfigError, ResourceError
from rlver_dist.models import TINY, resolve, weight_bytes
from rlver_dist.refusals import GIB, check_layers, check_memory
from rlver_dist.simulator_config import SimulatorConfig, UserEngineConfig
from rlver_dist.training_config import AlgorithmConfig, CriticConfig, LearnerConfig, LoraConfig, ModelConfig

PPO = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1)
CPU = ClusterConfig(engines=1, learner_ranks=1, kv_cache_gib=2)
USERS = SimulatorConfig(backend=SimulatorBackend.vllm, engine=UserEngineConfig(engines=2, kv_cache_gib=3))
MIB = 2**20


@pytest.fixture
def folders(tmp_path):
    """A policy's folder of a quarter of a million float32 weights, 1 MiB, and a users' of 3 MiB in two files."""
    for name, sizes in (("policy", [1]), ("users", [1, 2])):
        (tmp_path / name).mkdir()
        for index, size in enumerate(sizes):
            save_file({"w": torch.zeros(size * MIB // 4)}, tmp_path / name / f"model-{index}.safetensors")
    return str(tmp_path / "policy"), str(tmp_path / "users")


@pytest.mark.parametrize(
    ("changes", "learners"),
    [
        # Weights; and gradient and two moments of each in float32.
        ({}, 1 + 3),
        # In bfloat16 the file's numbers have a float32 copy, too.
        ({"model": ModelConfig(dtype=Precision.bfloat16), "learner": LearnerConfig(zero_stage=1)}, 1 + 4),
        ({"algorithm": AlgorithmConfig(group_size=2, kl_coef=0.1)}, 2 + 3),
        ({"model": ModelConfig(dtype=Precision.float32, lora=LoraConfig(rank=4))}, 1),
        ({"algorithm": PPO}, 2 + 6),
        ({"algorithm": PPO, "critic": CriticConfig(trunk=CriticTrunk.frozen)}, 2 + 3),
    ],
)
def test_memory_of_all_engines_and_learners_is_added_up(folders, changes, learners):
    config = RunConfig(**{"model": ModelConfig(dtype=Precision.float32), "cluster": CPU, "simulator": USERS, **changes})
    policy, users = (weight_bytes(folder) for folder in folders)
    assert MIB < policy < 1.01 * MIB and 3 * MIB < users < 3.01 * MIB
    # Weights count as their files, headers included; what is kept for each of them as numbers.
    copies = 2 if config.algorithm.kl_coef or config.has_critic else 1
    engines = 2 * GIB + policy + 2 * (3 * GIB + users)
    need = engines + copies * policy + (learners - copies) * MIB
    check_memory(config, *folders, have=need)
    with pytest.raises(
        ResourceError,
        match=r"^simulator.engine.model=.* need 8.0 GiB of memory \(engines 2.0, learners 0.0, users' engines 6.0\) and this machine",
    ):
        check_memory(config, *folders, have=need - 1)


def test_models_of_unknown_size_count_as_their_caches(folders):
    config = RunConfig(cluster=CPU, simulator=USERS)
    check_memory(config, "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct", have=8 * GIB)
    check_memory(config, "Qwen/Qwen2.5-7B-Instruct", None, have=2 * GIB)
    with pytest.raises(ResourceError, match=r"^model.path=.*use a smaller model or cluster.kv_cache_gib, or GPUs"):
        check_memory(config, "Qwen/Qwen2.5-7B-Instruct", None, have=2 * GIB - 1)


def test_layers_that_the_model_lacks_are_named():
    check_layers(RunConfig(algorithm=PPO, critic=CriticConfig(num_layers=2)), resolve(TINY))
    with pytest.raises(ConfigError, match=r"critic.num_layers=3: the model has 2 layers; use at most that"):
        check_layers(RunConfig(algorithm=PPO, critic=CriticConfig(num_layers=3)), resolve(TINY))
    check_layers(RunConfig(critic=CriticConfig(num_layers=3)), resolve(TINY))
    check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="q_proj, up_proj"))), resolve(TINY))
    with pytest.raises(
        ConfigError, match=r"no linear layer 'query' below its head; use all-linear or names among down_proj,gate_proj,k_proj,o_proj,q_proj"
    ):
        check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="q_proj,query"))), resolve(TINY))
    check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="query"))), "Qwen/Qwen2.5-7B-Instruct")
