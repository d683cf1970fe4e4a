"""Building every actor of a run on its layout, all at once, and taking them down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, remove_placement_group
from transformers import AutoTokenizer

from rlver_dist.bundled_models import resolve
from rlver_dist.cluster.components import Components
from rlver_dist.cluster.layout import Layout
from rlver_dist.cluster.learners import CriticGroup, PolicyGroup
from rlver_dist.cluster.place import (
    critic_ranks,
    policy_engines,
    policy_ranks,
    reward_services,
    user_engines,
)
from rlver_dist.cluster.pools import EnginePool, RewardPool, gather_metrics
from rlver_dist.cluster.session import reserve
from rlver_dist.cluster.weight_sync import WeightSync
from rlver_dist.config.run import RunConfig
from rlver_dist.learner.critic import CriticSettings
from rlver_dist.learner.policy_models import PolicySettings
from rlver_dist.rollout.engine import EngineSettings
from rlver_dist.rollout.renderer import Renderer, system_prompt
from rlver_dist.simulator.protocol import Judge
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.forecast import Forecast
from rlver_dist.tracking.jsonl import Tracker
from rlver_dist.tracking.metrics import Metric, Reduction
from rlver_dist.tracking.service_metrics import service_metrics

PROBE_TEXT = (
    "My sister has not spoken to me since the funeral in May. I wrote her two letters and tore up the first "
    "one, because every line of it sounded like an excuse. What would you have done?"
)
"""The fixed prompt of the post-sync probe; any ordinary text of some 60 tokens does."""


@dataclass(kw_only=True, slots=True)
class _Actors:
    """A run's actors, and what has to be taken down with them."""

    engines: EnginePool
    user_engines: list[ActorHandle]
    learner: PolicyGroup
    critic: CriticGroup | None
    sync: WeightSync
    replicas: list[ActorHandle]
    group: PlacementGroup | None

    async def metrics(self) -> list[Metric]:
        """Metrics of the reward service's replicas and the engines."""
        metrics = service_metrics(await gather_metrics(self.replicas))
        stats = await self.engines.stats()
        prompt = sum(stat["prompt_tokens"] for stat in stats)
        cached = sum(stat["cached_tokens"] for stat in stats)
        metrics.append(Metric("rollout/prefix_cache_hit", cached / max(prompt, 1), Reduction.last))
        return metrics

    async def close(self) -> None:
        """End engines and learners in order, then the actors."""
        critics = self.critic.ranks if self.critic else []
        closing = [*self.engines.engines, *self.user_engines, *self.learner.ranks, *critics]
        # vLLM's processes may outlive an actor that is only killed. One that hangs, or is dead already, must
        # not keep the others from ending.
        calls: list[asyncio.Future[object]] = [
            asyncio.wrap_future(actor.close.remote().future()) for actor in closing
        ]
        done, _ = await asyncio.wait(calls, timeout=20)
        for call in done:
            # asyncio prints every error that nobody has looked at, after the last line of the run.
            call.exception()
        for actor in [*closing, *self.replicas]:
            ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)
        self.sync.close()


@contextlib.asynccontextmanager
async def build(
    config: RunConfig,
    layout: Layout,
    *,
    warm_start: Path | None,
    second_judge: Judge | None,
    console: Console,
    trackers: Sequence[Tracker],
    forecast: Forecast,
) -> AsyncIterator[Components]:
    """Start engines, learners and reward services at the same time, wait until all of them answer, and take
    them down when the block ends.

    Args:
        config: the run's configuration.
        layout: where everything goes.
        warm_start: folder of the policy that a warm-up made; None starts from `model.path`.
        second_judge: see `Components`, like all that follow.
        console: shows the progress, too.
        trackers: pass through.
        forecast: passes through.

    Yields:
        The components that a driver works with.
    """
    # First of all, so that nothing is loaded for a run that cannot be placed.
    group = await reserve(layout, console.note)
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.model.path))
    think = config.rollout.think
    renderer = Renderer(tokenizer, system_prompt(config.model, think), think)
    actors = _create(config, layout, group, renderer, warm_start)
    try:
        await _start(actors, layout, console)
        yield Components(
            generate=actors.engines.generate,
            users=RewardPool(actors.replicas, "train").respond,
            evaluation_users=RewardPool(actors.replicas, "evaluation").respond,
            second_judge=second_judge,
            policy=actors.learner,
            critic=actors.critic,
            sync=actors.sync,
            service_metrics=actors.metrics,
            tokenizer=tokenizer,
            renderer=renderer,
            plain_renderer=Renderer(tokenizer, system_prompt(config.model, False)),
            trackers=trackers,
            console=console,
            forecast=forecast,
            ranks=layout.ranks,
        )
    finally:
        # An actor that died is not there to be closed, and what it died of is on its way to the caller.
        with contextlib.suppress(Exception):
            await actors.close()


def _create(
    config: RunConfig,
    layout: Layout,
    group: PlacementGroup | None,
    renderer: Renderer,
    warm_start: Path | None,
) -> _Actors:
    """All actors, none of which has loaded anything yet."""
    engine_settings = EngineSettings.from_config(
        config.model,
        config.cluster,
        device=layout.device,
        seed=config.seed,
        max_concurrent=config.rollout.max_concurrent,
        cpu_threads=layout.threads,
        stop_token_ids=(renderer.end_token_id,),
        weight_transfer=layout.weight_transfer,
    )
    engines = EnginePool(policy_engines(engine_settings, layout, group))
    speakers = user_engines(config.simulator, config.rollout.max_concurrent, layout, group)
    policy_settings = PolicySettings(
        model=config.model,
        algorithm=config.algorithm,
        learner=config.learner,
        temperature=config.rollout.temperature,
        seed=config.seed,
        warm_start=None if warm_start is None else str(warm_start),
    )
    critic_settings = CriticSettings(
        model=config.model,
        critic=config.critic,
        updates_per_iteration=config.algorithm.updates_per_iteration,
        seed=config.seed,
    )
    learner = PolicyGroup(policy_ranks(policy_settings, layout, group))
    critic = CriticGroup(critic_ranks(critic_settings, layout, group)) if layout.critic_ranks else None
    sync = WeightSync(
        learner,
        engines,
        backend=layout.weight_transfer,
        workers_per_engine=layout.policy.tensor_parallel,
        dtype=config.model.dtype,
        # In the form that the policy is asked in, special tokens and all.
        probe=renderer.opening_prompt(PROBE_TEXT),
    )
    return _Actors(
        engines=engines,
        user_engines=speakers,
        learner=learner,
        critic=critic,
        sync=sync,
        # After the users' engines, whose handles each replica holds.
        replicas=reward_services(config.simulator, layout, speakers),
        group=group,
    )


async def _start(actors: _Actors, layout: Layout, console: Console) -> None:
    """Wait until every actor has loaded what it holds."""
    learners = [actors.learner, *([actors.critic] if actors.critic else [])]
    total = layout.policy.count + layout.users.count + len(learners) + len(actors.replicas)
    with console.phase("loading models", total) as advance:
        waiting: list[Awaitable[object]] = []
        for engines in (actors.engines.engines, actors.user_engines):
            for engine in engines:
                waiting.append(asyncio.wrap_future(engine.start.remote().future()))
                if layout.shares_gpus:
                    # vLLM measures the free memory at its start, so nothing else may take any meanwhile.
                    await waiting[-1]
        waiting += [asyncio.ensure_future(learner.start()) for learner in learners]
        waiting += [asyncio.wrap_future(replica.start.remote().future()) for replica in actors.replicas]
        for started in asyncio.as_completed(waiting):
            await started
            advance(1)
        # Only now are there weights to measure, or engines to connect.
        await actors.sync.open()
