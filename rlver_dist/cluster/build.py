"""Building every actor of a run on its layout, all at once, and taking them down."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from transformers import AutoTokenizer

from rlver_dist.choices import Device
from rlver_dist.cluster.actors import MAX_CONCURRENCY, CriticLearnerActor, PolicyLearnerActor, RewardServiceActor
from rlver_dist.cluster.layout import Layout
from rlver_dist.cluster.learners import CriticGroup, PolicyGroup
from rlver_dist.cluster.pools import EnginePool, RewardPool, gather_metrics
from rlver_dist.cluster.session import reserve
from rlver_dist.cluster.weight_sync import WeightSync
from rlver_dist.config import RunConfig
from rlver_dist.models import resolve
from rlver_dist.rollout.engine import EngineSettings, PolicyEngine
from rlver_dist.rollout.renderer import Renderer, system_prompt
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.metrics import Metric, Reduction

PROBE_TEXT = (
    "My sister has not spoken to me since the funeral in May. I wrote her two letters and tore up the first one, because every line "
    "of it sounded like an excuse. What would you have done?"
)
"""The fixed prompt of the post-sync probe; any ordinary text of some 60 tokens does."""


CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    # Engine and learner share the cores in turn: threads that wait spin for a moment, since waking them for every small operation
    # costs more, then sleep, since the other one needs the core.
    "GOMP_SPINCOUNT": "20000",
}


@dataclass(kw_only=True, slots=True)
class Built:
    """A run's actors, grouped; `renderer` is the run's own, `plain_renderer` never asks for thinking."""

    engines: EnginePool
    users: RewardPool
    evaluation_users: RewardPool
    learner: PolicyGroup
    critic: CriticGroup | None
    sync: WeightSync
    tokenizer: Any
    renderer: Renderer
    plain_renderer: Renderer
    replicas: list[Any]
    group: PlacementGroup | None

    async def metrics(self) -> list[Metric]:
        """Metrics of the reward service's replicas and the engines."""
        metrics = []
        for values in await gather_metrics(self.replicas):
            for key, value in values.items():
                metrics.append(_service_metric(key, value, weight=values["requests"]))
        stats = await self.engines.stats()
        prompt, cached = (sum(stat[key] for stat in stats) for key in ("prompt_tokens", "cached_tokens"))
        metrics.append(Metric("rollout/prefix_cache_hit", cached / max(prompt, 1), Reduction.last))
        return metrics

    async def close(self) -> None:
        """End engines and learners in order, then the actors."""
        closing: list[Any] = [engine.close.remote() for engine in self.engines.engines] + [
            rank.close.remote() for rank in self._learner_ranks
        ]
        await asyncio.wait([asyncio.wrap_future(call.future()) for call in closing], timeout=20)
        for actor in [*self.engines.engines, *self._learner_ranks, *self.replicas]:
            ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)
        self.sync.close()

    @property
    def _learner_ranks(self) -> list[Any]:
        return self.learner.ranks + (self.critic.ranks if self.critic else [])


def _service_metric(key: str, value: float, weight: float) -> Metric:
    name = f"simulator/{key}"
    if key.endswith(("_max", "_s")) and not key.startswith("latency_mean"):
        return Metric(name, value, Reduction.max)
    if key in ("requests", "retries"):
        return Metric(name, value, Reduction.sum)
    return Metric(name, value, Reduction.mean, weight)


def _options(name: str, layout: Layout, group: PlacementGroup | None, bundle: int, gpus: float, threads: int) -> dict[str, Any]:
    options: dict[str, Any] = {"name": name, "num_cpus": 0, "num_gpus": gpus}
    if group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
        )
    if layout.device == "cpu":
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(threads), **CPU_ENVIRONMENT}}
    return options


def _engines(config: RunConfig, layout: Layout, group: PlacementGroup | None, end_token_id: int) -> list[Any]:
    engine_class: Any = ray.remote(PolicyEngine)
    spans_gpus = layout.tensor_parallel > 1
    engines = []
    for index in range(layout.engines):
        settings = EngineSettings(
            model_path=resolve(config.model.path),
            dtype=config.model.dtype,
            device=Device(layout.device),
            seed=config.seed,
            max_context_tokens=config.model.max_context_tokens,
            stop_token_ids=(end_token_id,),
            weight_transfer=layout.weight_transfer,
            max_concurrent=config.rollout.max_concurrent,
            tensor_parallel=layout.tensor_parallel,
            gpu_memory_fraction=layout.gpu_memory_fraction,
            kv_cache_gib=config.cluster.kv_cache_gib,
            cpu_threads=layout.threads,
            distributed_executor="ray" if spans_gpus else None,
        )
        bundle = index * layout.tensor_parallel
        options = _options(
            f"rollout_engine_{index}", layout, group, bundle, 0 if spans_gpus else layout.gpus_per_engine_rank, layout.threads
        )
        if spans_gpus:
            bundles = ",".join(str(bundle + worker) for worker in range(layout.tensor_parallel))
            options["runtime_env"] = {
                "env_vars": {
                    "VLLM_RAY_BUNDLE_INDICES": bundles,
                    "VLLM_RAY_PER_WORKER_GPUS": str(layout.gpus_per_engine_rank),
                    # This actor reserves no GPU itself; without this Ray would hide all of them from it.
                    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                }
            }
        engines.append(engine_class.options(**options, max_concurrency=MAX_CONCURRENCY).remote(settings))
    return engines


def _learners(config: RunConfig, layout: Layout, group: PlacementGroup | None, *, critic: bool) -> list[Any]:
    """Ranks of the policy learner, or of the critic, whose bundles come after the policy's."""
    actor: Any = ray.remote(CriticLearnerActor if critic else PolicyLearnerActor)
    name, ranks = ("critic_learner", layout.critic_ranks) if critic else ("policy_learner", layout.learner_ranks)
    first = layout.engines * layout.tensor_parallel + (layout.learner_ranks if critic else 0)
    return [
        actor.options(**_options(f"{name}_{rank}", layout, group, first + rank, layout.gpus_per_learner_rank, layout.threads)).remote(
            config, rank, ranks, layout.device, layout.threads
        )
        for rank in range(ranks)
    ]


def _services(config: RunConfig, layout: Layout) -> list[Any]:
    service: Any = ray.remote(RewardServiceActor)
    return [
        service.options(
            name=f"reward_service_{index}",
            num_cpus=0,
            max_concurrency=MAX_CONCURRENCY,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        ).remote(config.simulator)
        for index in range(layout.reward_replicas)
    ]


async def build(config: RunConfig, layout: Layout, console: Console, warm_start: str | None) -> Built:
    """Start engines, learners and reward services at the same time and wait until all of them answer.

    Args:
        config: the run's configuration.
        layout: where everything goes.
        console: shows the progress.
        warm_start: folder of the policy that a warm-up made; None starts from `model.path`.
    """
    group = await reserve(layout, console.note)
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.model.path))
    think = config.rollout.think
    renderer = Renderer(tokenizer, system_prompt(config.model, think), think)
    engines = EnginePool(_engines(config, layout, group, renderer.end_token_id))
    learner = PolicyGroup(_learners(config, layout, group, critic=False))
    critic = CriticGroup(_learners(config, layout, group, critic=True)) if layout.critic_ranks else None
    replicas = _services(config, layout)
    sync = WeightSync(
        learner,
        engines,
        backend=layout.weight_transfer,
        workers_per_engine=layout.tensor_parallel,
        dtype=config.model.dtype,
        probe=renderer.opening_prompt(PROBE_TEXT),
    )
    built = Built(
        engines=engines,
        users=RewardPool(replicas, "train"),
        evaluation_users=RewardPool(replicas, "evaluation"),
        learner=learner,
        critic=critic,
        sync=sync,
        tokenizer=tokenizer,
        renderer=renderer,
        plain_renderer=Renderer(tokenizer, system_prompt(config.model, False)),
        replicas=replicas,
        group=group,
    )
    try:
        await _start(built, layout, console, warm_start)
    except BaseException:
        await built.close()
        raise
    return built


async def _start(built: Built, layout: Layout, console: Console, warm_start: str | None) -> None:
    """Wait until every actor has loaded what it holds."""
    learners = 2 if built.critic else 1
    with console.phase("loading models", layout.engines + learners + len(built.replicas)) as advance:
        starting: list[Any] = [engine.start.remote() for engine in built.engines.engines]
        waiting = [asyncio.wrap_future(call.future()) for call in starting]
        if 0 < layout.gpus_per_engine_rank < 1:
            # They share a GPU: vLLM measures the free memory at its start, before the learner takes its part.
            await asyncio.gather(*waiting)
        waiting.append(asyncio.ensure_future(built.learner.start(warm_start)))
        if built.critic:
            waiting.append(asyncio.ensure_future(built.critic.start()))
        waiting += [asyncio.wrap_future(replica.metrics.remote().future()) for replica in built.replicas]
        for part in asyncio.as_completed(waiting):
            await part
            advance(1)
        await built.sync.open()
