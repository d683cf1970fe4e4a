"""Making the actors of a layout, each on its own bundle of the placement group; none of them has loaded
anything yet.

The plain classes are wrapped by `ray.remote` once, here; their names are what `ray list actors` and the
dashboard show. No actor asks Ray for cores of its own: engines, learners and services of a run take turns,
and their threads are set by the layout. The classes import heavy packages inside their methods, so that vLLM
and DeepSpeed meet neither in the driver nor in one actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlver_dist.cluster.actors import RewardServiceActor
from rlver_dist.cluster.layout import EngineGroup, Layout
from rlver_dist.cluster.learners import PROGRESS_THREAD
from rlver_dist.config.enums import Device
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.learner.critic import CriticLearner, CriticSettings
from rlver_dist.learner.policy import PolicyLearner
from rlver_dist.learner.policy_models import PolicySettings
from rlver_dist.learner.rank import RankPlace
from rlver_dist.rollout.chat_engine import ChatEngine
from rlver_dist.rollout.engine import EngineSettings, PolicyEngine

Options = dict[str, object]
"""Keyword arguments of an actor's `options`, as Ray names them."""
MAX_CONCURRENCY = 4096
"""Calls that wait inside one engine or service actor; Ray's own limit of 1,000 would stall a large batch
unseen."""
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
    settings: EngineSettings, layout: Layout, group: PlacementGroup | None
) -> list[ActorHandle]:
    """`PolicyEngine` actors, `rollout_engine_<n>`."""
    every = _engine_options("rollout_engine", layout, layout.policy, group, 0)
    return _make(PolicyEngine, every, _as_placed(settings, layout.policy))


def user_engines(
    simulator: SimulatorConfig, max_concurrent: int, layout: Layout, group: PlacementGroup | None
) -> list[ActorHandle]:
    """`ChatEngine` actors, `user_engine_<n>`, of `max_concurrent` requests each; none where the users need no
    engines."""
    if layout.users.count == 0:
        return []
    engine = simulator.engine
    settings = EngineSettings.from_config(
        engine,
        engine,
        device=layout.device,
        seed=simulator.llm.seed,
        max_concurrent=max_concurrent,
        cpu_threads=layout.threads,
    )
    every = _engine_options("user_engine", layout, layout.users, group, layout.policy.ranks)
    return _make(ChatEngine, every, _as_placed(settings, layout.users), engine.model)


def policy_ranks(settings: PolicySettings, layout: Layout, group: PlacementGroup | None) -> list[ActorHandle]:
    """`PolicyLearner` actors, `policy_learner_<rank>`, whose bundles come after the engines'."""
    first = layout.policy.ranks + layout.users.ranks
    return _make_ranks(PolicyLearner, settings, "policy_learner", layout.learner_ranks, layout, group, first)


def critic_ranks(settings: CriticSettings, layout: Layout, group: PlacementGroup | None) -> list[ActorHandle]:
    """`CriticLearner` actors, `critic_learner_<rank>`, whose bundles come after the policy learner's."""
    first = layout.policy.ranks + layout.users.ranks + layout.learner_ranks
    return _make_ranks(CriticLearner, settings, "critic_learner", layout.critic_ranks, layout, group, first)


def reward_services(
    simulator: SimulatorConfig, layout: Layout, engines: list[ActorHandle]
) -> list[ActorHandle]:
    """`RewardServiceActor`s, `reward_service_<n>`, in front of the users' `engines`."""
    every = [_service_options(index) for index in range(layout.reward_replicas)]
    return _make(RewardServiceActor, every, simulator, engines)


def _make(kind: type, every: list[Options], *arguments: object) -> list[ActorHandle]:
    """An actor of class `kind` for each of the options in `every`, all of the same `arguments`."""
    wrapped: Any = ray.remote(kind)
    return [wrapped.options(**options).remote(*arguments) for options in every]


def _make_ranks(
    kind: type[PolicyLearner] | type[CriticLearner],
    settings: PolicySettings | CriticSettings,
    name: str,
    world_size: int,
    layout: Layout,
    group: PlacementGroup | None,
    first: int,
) -> list[ActorHandle]:
    """The ranks of one learner, on the bundles from `first` on."""
    # A concurrency group belongs to the class, so Ray takes it here and not among one actor's options.
    remote: Any = ray.remote  # whose type knows no concurrency groups
    wrapped = remote(concurrency_groups={PROGRESS_THREAD: 1})(kind)
    ranks = []
    for rank in range(world_size):
        place = RankPlace(rank=rank, world_size=world_size, device=layout.device, num_threads=layout.threads)
        options = _learner_options(f"{name}_{rank}", layout, group, first + rank)
        ranks.append(wrapped.options(**options).remote(settings, place))
    return ranks


def _as_placed(settings: EngineSettings, engines: EngineGroup) -> EngineSettings:
    """`settings` on the GPUs that the layout gives the engines: a derived layout divides them otherwise than
    the configuration."""
    return replace(
        settings,
        tensor_parallel=engines.tensor_parallel,
        gpu_memory_fraction=engines.gpu_memory_fraction,
        # Its workers are actors of their own then, in this placement group.
        distributed_executor="ray" if engines.tensor_parallel > 1 else None,
    )


def _service_options(index: int) -> Options:
    return {
        "name": f"reward_service_{index}",
        "num_cpus": 0,
        "max_concurrency": MAX_CONCURRENCY,
        # Sentence embeddings are bit for bit the same only at a fixed number of threads.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }


def _options(
    name: str,
    group: PlacementGroup | None,
    bundle: int,
    gpus: float,
    environment: Mapping[str, str],
) -> Options:
    """Ray's options of one actor that reserves `gpus` of its bundle and starts with `environment` set."""
    options: Options = {"name": name, "num_cpus": 0, "num_gpus": gpus}
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=group,
            placement_group_bundle_index=bundle,
            # vLLM's workers, which the engine's actor starts, belong into the same placement group.
            placement_group_capture_child_tasks=True,
        )
    if environment:
        options["runtime_env"] = {"env_vars": dict(environment)}
    return options


def _learner_options(name: str, layout: Layout, group: PlacementGroup | None, bundle: int) -> Options:
    # Ray gives an actor that reserves no cores a single thread; on GPUs an offloaded optimizer steps on the
    # host.
    environment = {"OMP_NUM_THREADS": str(layout.threads)}
    if layout.device is Device.cpu:
        environment |= CPU_ENVIRONMENT | {"GOMP_SPINCOUNT": LEARNER_SPIN_COUNT}
    return _options(name, group, bundle, layout.gpus_per_learner_rank, environment)


def _engine_options(
    kind: str, layout: Layout, engines: EngineGroup, group: PlacementGroup | None, first: int
) -> list[Options]:
    """Ray's options of each engine actor of a group whose bundles begin at `first`."""
    spans_gpus = engines.tensor_parallel > 1
    every = []
    for index in range(engines.count):
        bundle = first + index * engines.tensor_parallel
        environment: dict[str, str] = {}
        if layout.device is Device.cpu:
            environment = {"OMP_NUM_THREADS": str(layout.threads), **CPU_ENVIRONMENT}
        if spans_gpus:
            bundles = ",".join(str(bundle + worker) for worker in range(engines.tensor_parallel))
            environment = {
                "VLLM_RAY_BUNDLE_INDICES": bundles,
                "VLLM_RAY_PER_WORKER_GPUS": str(engines.gpus_per_rank),
                # This actor reserves no GPU itself; without this Ray would hide all of them from it.
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            }
        # The workers of an engine on several GPUs reserve them, one each.
        gpus = 0 if spans_gpus else engines.gpus_per_rank
        options = _options(f"{kind}_{index}", group, bundle, gpus, environment)
        every.append(options | {"max_concurrency": MAX_CONCURRENCY})
    return every
