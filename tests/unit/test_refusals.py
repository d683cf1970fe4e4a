"""What is looked for before anything starts."""

import pytest

from rlver_dist.choices import AlgorithmName, Precision, SimulatorBackend
from rlver_dist.config import ClusterConfig, RunConfig
from rlver_dist.errors import ConfigError, ResourceError
from rlver_dist.models import TINY, resolve
from rlver_dist.refusals import GIB, check_layers, check_memory
from rlver_dist.simulator_config import SimulatorConfig, UserEngineConfig
from rlver_dist.training_config import AlgorithmConfig, CriticConfig, LearnerConfig, LoraConfig, ModelConfig


@pytest.fixture
def folders(tmp_path):
    """A policy's folder of 1 MiB of weights, and a users' of 3 MiB in two files."""
    for name, sizes in (("policy", [1]), ("users", [1, 2])):
        (tmp_path / name).mkdir()
        for index, size in enumerate(sizes):
            (tmp_path / name / f"model-{index}.safetensors").write_bytes(bytes(size * 2**20))
    return str(tmp_path / "policy"), str(tmp_path / "users")


def test_memory_of_all_engines_is_added_up(folders):
    config = RunConfig(
        model=ModelConfig(dtype=Precision.float32),
        learner=LearnerConfig(),
        cluster=ClusterConfig(engines=1, learner_ranks=1, kv_cache_gib=2),
        simulator=SimulatorConfig(backend=SimulatorBackend.vllm, engine=UserEngineConfig(engines=2, kv_cache_gib=3)),
    )
    need = (2 * GIB + 2**20) + 2 * (3 * GIB + 3 * 2**20)
    check_memory(config, *folders, have=need)
    with pytest.raises(ResourceError, match=r"need 8.0 GiB of memory and this machine has 8.0 GiB; use a smaller model"):
        check_memory(config, *folders, have=need - 1)
    check_memory(config, "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-14B-Instruct", have=8 * GIB)


def test_layers_that_the_model_lacks_are_named():
    ppo = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1)
    check_layers(RunConfig(algorithm=ppo, critic=CriticConfig(num_layers=2)), resolve(TINY))
    with pytest.raises(ConfigError, match=r"critic.num_layers=3: the model has 2 layers; use at most that"):
        check_layers(RunConfig(algorithm=ppo, critic=CriticConfig(num_layers=3)), resolve(TINY))
    check_layers(RunConfig(critic=CriticConfig(num_layers=3)), resolve(TINY))
    check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="q_proj, up_proj"))), resolve(TINY))
    with pytest.raises(
        ConfigError, match=r"no linear layer 'query' below its head; use all-linear or names among down_proj,gate_proj,k_proj,o_proj,q_proj"
    ):
        check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="q_proj,query"))), resolve(TINY))
    check_layers(RunConfig(model=ModelConfig(lora=LoraConfig(rank=4, target_modules="query"))), "Qwen/Qwen2.5-7B-Instruct")
