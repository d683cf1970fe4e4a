"""Which bundle is whose: the order in which GPUs are reserved is the order in which actors take them."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rlver_dist.cluster import place
from rlver_dist.cluster.layout import EngineGroup, Layout, resolve_layout
from rlver_dist.cluster.session import bundles
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device, Precision, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.errors import DataError
from rlver_dist.rollout.engine import EngineSettings, set_environment

GROUP = object()
"""Stands where a placement group stands."""
ENGINE = EngineSettings(
    model_path="m", dtype=Precision.float32, device=Device.cpu, seed=0, max_context_tokens=64, cpu_threads=3
)


class Actors:
    """Stands where `ray.remote` stands: wraps any class, and notes each actor's options."""

    def __init__(self) -> None:
        self.made: list[dict] = []

    def __call__(self, *wrapped, **options) -> Actors:
        return self

    def options(self, **options) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self.made.append(options | {"arguments": arguments}))


def made(monkeypatch, make, *arguments, **named) -> list[dict]:
    """Ray's options of each actor that `make` makes, and what it is made of, as `arguments`."""
    actors = Actors()
    monkeypatch.setattr(place.ray, "remote", actors)
    make(*arguments, **named)
    return actors.made


def bundle_indices(options: list[dict]) -> list[int]:
    """The bundle that each actor takes."""
    strategies = [one["scheduling_strategy"] for one in options]
    assert all(strategy.placement_group is GROUP for strategy in strategies)
    return [strategy.placement_group_bundle_index for strategy in strategies]


def on_gpus(users: UserEngineConfig, **cluster) -> tuple[RunConfig, Layout]:
    config = RunConfig(
        cluster=ClusterConfig(device=Device.gpu, **cluster),
        simulator=SimulatorConfig(backend=SimulatorBackend.vllm, engine=users),
    )
    return config, resolve_layout(config, num_gpus=32, num_cpus=8)


def test_engines_of_several_gpus_take_the_bundles_after_the_policys(monkeypatch):
    config, layout = on_gpus(UserEngineConfig(engines=2, tensor_parallel=2), engines=3, learner_ranks=4)
    assert [bundle["GPU"] for bundle in bundles(layout)] == [1.0] * (3 + 4 + 4)
    options = made(monkeypatch, place.user_engines, config.simulator, 8, layout, GROUP)
    assert [one["name"] for one in options] == ["user_engine_0", "user_engine_1"]
    assert bundle_indices(options) == [3, 5]
    assert [one["runtime_env"]["env_vars"]["VLLM_RAY_BUNDLE_INDICES"] for one in options] == ["3,4", "5,6"]
    assert [one["num_gpus"] for one in options] == [0, 0]
    # An asynchronous actor takes 1,000 calls at once by itself; the others would wait outside of vLLM's
    # batch.
    assert all(one["max_concurrency"] > 1000 for one in options)
    assert bundle_indices(made(monkeypatch, place.policy_engines, ENGINE, layout, GROUP)) == [0, 1, 2]
    ranks = made(monkeypatch, place.policy_ranks, None, layout, GROUP)
    assert bundle_indices(ranks) == [7, 8, 9, 10]


def test_shares_of_one_gpu_stand_in_the_actors_order(monkeypatch):
    shares = {"gpus_per_engine_rank": 0.2, "gpus_per_learner_rank": 0.5}
    config, layout = on_gpus(
        UserEngineConfig(engines=1, gpus_per_rank=0.3), engines=1, learner_ranks=1, **shares
    )
    assert [bundle["GPU"] for bundle in bundles(layout)] == [0.2, 0.3, 0.5]
    (options,) = made(monkeypatch, place.user_engines, config.simulator, 8, layout, None)
    assert (
        options["num_gpus"] == 0.3 and "runtime_env" not in options and "scheduling_strategy" not in options
    )
    (options,) = made(monkeypatch, place.policy_ranks, None, layout, None)
    assert options["num_gpus"] == 0.5


def test_learners_on_gpus_share_out_the_cores_for_what_steps_on_the_host(monkeypatch):
    _, layout = on_gpus(UserEngineConfig(), engines=1, learner_ranks=3)
    assert layout.threads == 8 // 3
    ranks = made(monkeypatch, place.policy_ranks, None, layout, None)
    assert [one["name"] for one in ranks] == [f"policy_learner_{rank}" for rank in range(3)]
    assert [one["runtime_env"] for one in ranks] == [{"env_vars": {"OMP_NUM_THREADS": "2"}}] * 3
    (engine,) = made(monkeypatch, place.policy_engines, ENGINE, layout, None)
    assert "runtime_env" not in engine
    assert on_gpus(UserEngineConfig(), engines=1, learner_ranks=16)[1].threads == 1


def test_learners_on_cpus_get_their_threads(monkeypatch):
    """Ray gives an actor that reserves no cores a single thread."""
    config = RunConfig(cluster=ClusterConfig(device=Device.cpu, engines=1, learner_ranks=1))
    layout = resolve_layout(config, num_gpus=0, num_cpus=6)
    assert layout.threads == 6
    (options,) = made(monkeypatch, place.policy_ranks, None, layout, None)
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "6"


def test_reward_services_take_more_calls_than_rays_thousand(monkeypatch):
    config = RunConfig(
        cluster=ClusterConfig(device=Device.cpu, engines=1, learner_ranks=1),
        simulator=SimulatorConfig(replicas=2),
    )
    layout = resolve_layout(config, num_gpus=0, num_cpus=6)
    options = made(monkeypatch, place.reward_services, config.simulator, layout, [])
    assert options == [
        {
            "name": f"reward_service_{index}",
            "num_cpus": 0,
            "max_concurrency": place.MAX_CONCURRENCY,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
            "arguments": (config.simulator, []),
        }
        for index in range(2)
    ]
    assert place.MAX_CONCURRENCY > 1000


def test_an_engine_takes_the_gpus_of_its_layout_where_they_are_not_those_of_its_options(monkeypatch):
    config = RunConfig(cluster=ClusterConfig(tensor_parallel=2, gpu_memory_fraction=0.85, kv_cache_gib=3))
    configured = EngineSettings.from_config(
        config.model, config.cluster, device=Device.gpu, seed=5, max_concurrent=7, cpu_threads=4
    )
    assert (configured.model_path, configured.dtype) == (config.model.path, Precision.bfloat16)
    assert (configured.tensor_parallel, configured.gpu_memory_fraction) == (2, 0.85)
    assert (configured.kv_cache_gib, configured.weight_transfer) == (3, None)
    layout = resolve_layout(config, num_gpus=1, num_cpus=8)
    (engine,) = made(monkeypatch, place.policy_engines, configured, layout, None)
    (placed,) = engine["arguments"]
    assert (placed.tensor_parallel, placed.gpu_memory_fraction) == (1, 0.35)
    assert (placed.distributed_executor, placed.kv_cache_gib) == (None, 3)
    spanning = replace(layout, policy=EngineGroup(count=1, tensor_parallel=2))
    (engine,) = made(monkeypatch, place.policy_engines, configured, spanning, GROUP)
    assert engine["arguments"][0].distributed_executor == "ray"


def test_a_users_engine_names_its_own_option_where_its_model_is_missing():
    engine = UserEngineConfig(model="/no/such/folder")
    with pytest.raises(DataError, match=r"^simulator\.engine\.model=/no/such/folder"):
        EngineSettings.from_config(engine, engine, device=Device.cpu, seed=0, max_concurrent=1, cpu_threads=1)


def test_a_cpu_engine_takes_the_cores_that_it_is_given(monkeypatch):
    """vLLM's own choice binds one core and keeps another free, which are both of a small machine."""
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "auto")
    set_environment(ENGINE)
    assert (os.environ["VLLM_CPU_OMP_THREADS_BIND"], os.environ["OMP_NUM_THREADS"]) == ("nobind", "3")
