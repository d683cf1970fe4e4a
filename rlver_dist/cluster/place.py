"""Making the actors of a layout, each on the bundle that is its own; none of them has loaded anything yet."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlver_dist.bundled_models import resolve
from rlver_dist.cluster.actors import (
    MAX_CONCURRENCY,
    PROGRESS_THREAD,
    CriticLearnerActor,
    PolicyLearnerActor,
    RewardServiceActor,
)
from rlver_dist.cluster.layout import EngineGroup, Layout
from rlver_dist.config.enums import Device
from rlver_dist.config.run import RunConfig
from rlver_dist.rollout.chat_engine import ChatEngine
from rlver_dist.rollout.engine import EngineSettings, PolicyEngine

CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    # Engine and learner share the cores in turn: threads that wait spin for a moment, since waking them for
    # every small operation costs more, then sleep, since the other one needs the core.
    "GOMP_SPINCOUNT": "20000",
}
LEARNER_SPIN_COUNT = "300000"
"""While a learner computes, engine and users are idle, and its threads may spin for longer: its forward pass
takes a tenth less time."""


def policy_engines(
    config: RunConfig, layout: Layout, group: PlacementGroup | None, end_token_id: int
) -> list[Any]:
    """`PolicyEngine` actors, `rollout_engine_<n>`."""
    settings = EngineSettings(
        model_path=resolve(config.model.path),
        dtype=config.model.dtype,
        device=Device(layout.device),
        seed=config.seed,
        max_context_tokens=config.model.max_context_tokens,
        stop_token_ids=(end_token_id,),
        weight_transfer=layout.weight_transfer,
        max_concurrent=config.rollout.max_concurrent,
        tensor_parallel=layout.policy.tensor_parallel,
        gpu_memory_fraction=layout.policy.gpu_memory_fraction,
        kv_cache_gib=config.cluster.kv_cache_gib,
        cpu_threads=layout.threads,
        distributed_executor="ray" if layout.policy.tensor_parallel > 1 else None,
    )
    actor: Any = ray.remote(PolicyEngine)
    return [
        actor.options(**options).remote(settings)
        for options in _engine_options("rollout_engine", layout, layout.policy, group, 0)
    ]


def user_engines(config: RunConfig, layout: Layout, group: PlacementGroup | None) -> list[Any]:
    """`ChatEngine` actors, `user_engine_<n>`; none where the users need no engines."""
    engine = config.simulator.engine
    if layout.users.count == 0:
        return []
    settings = EngineSettings(
        model_path=resolve(engine.model, "simulator.engine.model"),
        dtype=engine.dtype,
        device=Device(layout.device),
        seed=config.simulator.llm.seed,
        max_context_tokens=engine.max_context_tokens,
        weight_transfer=None,
        max_concurrent=config.rollout.max_concurrent,
        tensor_parallel=layout.users.tensor_parallel,
        gpu_memory_fraction=layout.users.gpu_memory_fraction,
        kv_cache_gib=engine.kv_cache_gib,
        cpu_threads=layout.threads,
        distributed_executor="ray" if layout.users.tensor_parallel > 1 else None,
    )
    actor: Any = ray.remote(ChatEngine)
    every = _engine_options("user_engine", layout, layout.users, group, layout.policy.ranks)
    return [actor.options(**options).remote(settings, engine.model) for options in every]


def learner_ranks(
    config: RunConfig, layout: Layout, group: PlacementGroup | None, *, critic: bool
) -> list[Any]:
    """Ranks of the policy learner, or of the critic, whose bundles come after the policy's."""
    remote: Any = ray.remote  # whose type knows no concurrency groups
    actor = remote(concurrency_groups={PROGRESS_THREAD: 1})(
        CriticLearnerActor if critic else PolicyLearnerActor
    )
    name, ranks = (
        ("critic_learner", layout.critic_ranks) if critic else ("policy_learner", layout.learner_ranks)
    )
    first = layout.policy.ranks + layout.users.ranks + (layout.learner_ranks if critic else 0)
    return [
        actor.options(**_learner_options(f"{name}_{rank}", layout, group, first + rank)).remote(
            config, rank, ranks, layout.device, layout.threads
        )
        for rank in range(ranks)
    ]


def reward_services(config: RunConfig, layout: Layout, engines: list[Any]) -> list[Any]:
    """`RewardServiceActor`s, `reward_service_<n>`, in front of the users' `engines`."""
    actor: Any = ray.remote(RewardServiceActor)
    return [
        actor.options(**_service_options(index)).remote(config.simulator, engines)
        for index in range(layout.reward_replicas)
    ]


def _service_options(index: int) -> dict[str, Any]:
    runtime_env = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    return {
        "name": f"reward_service_{index}",
        "num_cpus": 0,
        "max_concurrency": MAX_CONCURRENCY,
        "runtime_env": runtime_env,
    }


def _options(
    name: str, layout: Layout, group: PlacementGroup | None, bundle: int, gpus: float
) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "num_gpus": gpus}
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=bundle,
            placement_group_capture_child_tasks=True,
        )
    if layout.device == "cpu":
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(layout.threads), **CPU_ENVIRONMENT}}
    return options


def _learner_options(name: str, layout: Layout, group: PlacementGroup | None, bundle: int) -> dict[str, Any]:
    options = _options(name, layout, group, bundle, layout.gpus_per_learner_rank)
    if layout.device == "cpu":
        options["runtime_env"]["env_vars"]["GOMP_SPINCOUNT"] = LEARNER_SPIN_COUNT
    if layout.device == "gpu":
        # Ray gives an actor that reserves no cores a single thread; an offloaded optimizer steps on the host.
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(layout.threads)}}
    return options


def _engine_options(
    kind: str, layout: Layout, engines: EngineGroup, group: PlacementGroup | None, first: int
) -> list[dict[str, Any]]:
    """Ray's options of each engine actor of a group whose bundles begin at `first`."""
    spans_gpus, every = engines.tensor_parallel > 1, []
    for index in range(engines.count):
        bundle = first + index * engines.tensor_parallel
        options = _options(
            f"{kind}_{index}", layout, group, bundle, 0 if spans_gpus else engines.gpus_per_rank
        )
        if spans_gpus:
            bundles = ",".join(str(bundle + worker) for worker in range(engines.tensor_parallel))
            options["runtime_env"] = {
                "env_vars": {
                    "VLLM_RAY_BUNDLE_INDICES": bundles,
                    "VLLM_RAY_PER_WORKER_GPUS": str(engines.gpus_per_rank),
                    # This actor reserves no GPU itself; without this Ray would hide all of them from it.
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                }
            }
        every.append(options | {"max_concurrency": MAX_CONCURRENCY})
    return every
