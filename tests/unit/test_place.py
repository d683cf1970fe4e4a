"""Which bundle is whose: the order in which GPUs are reserved is the order in which actors take them."""

import os

import pytest

from rlver_dist.cluster.layout import EngineGroup, Layout, resolve_layout
from rlver_dist.cluster.place import (
    MAX_CONCURRENCY,
    _as_placed,
    _engine_options,
    _learner_options,
    _service_options,
)
from rlver_dist.cluster.session import bundles
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device, Precision, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.errors import DataError
from rlver_dist.rollout.engine import EngineSettings, set_environment


def layout(users: UserEngineConfig, **cluster) -> Layout:
    config = RunConfig(
        cluster=ClusterConfig(device=Device.gpu, **cluster),
        simulator=SimulatorConfig(backend=SimulatorBackend.vllm, engine=users),
    )
    return resolve_layout(config, num_gpus=32, num_cpus=8)


def test_engines_of_several_gpus_take_the_bundles_after_the_policys():
    placed = layout(UserEngineConfig(engines=2, tensor_parallel=2), engines=3, learner_ranks=4)
    assert [bundle["GPU"] for bundle in bundles(placed)] == [1.0] * (3 + 4 + 4)
    options = _engine_options("user_engine", placed, placed.users, None, placed.policy.ranks)
    assert [one["name"] for one in options] == ["user_engine_0", "user_engine_1"]
    assert [one["runtime_env"]["env_vars"]["VLLM_RAY_BUNDLE_INDICES"] for one in options] == ["3,4", "5,6"]
    assert [one["num_gpus"] for one in options] == [0, 0]
    # An asynchronous actor takes 1,000 calls at once by itself; the others would wait outside of vLLM's
    # batch.
    assert all(one["max_concurrency"] > 1000 for one in options)


def test_shares_of_one_gpu_stand_in_the_actors_order():
    shares = {"gpus_per_engine_rank": 0.2, "gpus_per_learner_rank": 0.5}
    placed = layout(UserEngineConfig(engines=1, gpus_per_rank=0.3), engines=1, learner_ranks=1, **shares)
    assert [bundle["GPU"] for bundle in bundles(placed)] == [0.2, 0.3, 0.5]
    (options,) = _engine_options("user_engine", placed, placed.users, None, placed.policy.ranks)
    assert options["num_gpus"] == 0.3 and "runtime_env" not in options


def test_learners_on_gpus_share_out_the_cores_for_what_steps_on_the_host():
    placed = layout(UserEngineConfig(), engines=1, learner_ranks=3)
    assert placed.threads == 8 // 3
    assert _learner_options("policy_learner_0", placed, None, 2)["runtime_env"] == {
        "env_vars": {"OMP_NUM_THREADS": "2"}
    }
    assert "runtime_env" not in _engine_options("rollout_engine", placed, placed.policy, None, 0)[0]
    assert layout(UserEngineConfig(), engines=1, learner_ranks=16).threads == 1


def test_learners_on_cpus_get_their_threads():
    """Ray gives an actor that reserves no cores a single thread."""
    placed = resolve_layout(
        RunConfig(cluster=ClusterConfig(device=Device.cpu, engines=1, learner_ranks=1)),
        num_gpus=0,
        num_cpus=6,
    )
    assert placed.threads == 6
    assert (
        _learner_options("policy_learner_0", placed, None, 1)["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]
        == "6"
    )


def test_reward_services_take_more_calls_than_rays_thousand():
    assert _service_options(1) == {
        "name": "reward_service_1",
        "num_cpus": 0,
        "max_concurrency": MAX_CONCURRENCY,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }
    assert MAX_CONCURRENCY > 1000


def test_an_engine_takes_the_gpus_of_its_layout_where_they_are_not_those_of_its_options():
    config = RunConfig(cluster=ClusterConfig(tensor_parallel=2, gpu_memory_fraction=0.85, kv_cache_gib=3))
    configured = EngineSettings.from_config(
        config.model, config.cluster, device=Device.gpu, seed=5, max_concurrent=7, cpu_threads=4
    )
    assert (configured.model_path, configured.dtype) == (config.model.path, Precision.bfloat16)
    assert (configured.tensor_parallel, configured.gpu_memory_fraction) == (2, 0.85)
    assert (configured.kv_cache_gib, configured.weight_transfer) == (3, None)
    placed = _as_placed(configured, resolve_layout(config, num_gpus=1, num_cpus=8).policy)
    assert (placed.tensor_parallel, placed.gpu_memory_fraction) == (1, 0.35)
    assert (placed.distributed_executor, placed.kv_cache_gib) == (None, 3)
    assert _as_placed(configured, EngineGroup(count=1, tensor_parallel=2)).distributed_executor == "ray"


def test_a_users_engine_names_its_own_option_where_its_model_is_missing():
    engine = UserEngineConfig(model="/no/such/folder")
    with pytest.raises(DataError, match=r"^simulator\.engine\.model=/no/such/folder"):
        EngineSettings.from_config(engine, engine, device=Device.cpu, seed=0, max_concurrent=1, cpu_threads=1)


def test_a_cpu_engine_takes_the_cores_that_it_is_given(monkeypatch):
    """vLLM's own choice binds one core and keeps another free, which are both of a small machine."""
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "auto")
    settings = EngineSettings(
        model_path="m",
        dtype=Precision.float32,
        device=Device.cpu,
        seed=0,
        max_context_tokens=64,
        cpu_threads=3,
    )
    set_environment(settings)
    assert (os.environ["VLLM_CPU_OMP_THREADS_BIND"], os.environ["OMP_NUM_THREADS"]) == ("nobind", "3")
