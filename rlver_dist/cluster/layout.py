"""Which device holds what: pure arithmetic, no Ray.

A layout is derived from the configuration and the number of GPUs and cores. `session.py` asks Ray for them,
`preflight/dry_run.py` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.errors import ConfigError, DataError, ResourceError


@dataclass(kw_only=True, slots=True, frozen=True)
class EngineGroup:
    """vLLM engines of one model.

    Attributes:
        count: engines; 0 where there are none.
        tensor_parallel: GPUs an engine.
        gpus_per_rank: GPUs that Ray reserves for each of an engine's workers; 0 on CPUs.
        gpu_memory_fraction: fraction of a GPU's memory that an engine takes.
    """

    count: int
    tensor_parallel: int = 1
    gpus_per_rank: float = 0.0
    gpu_memory_fraction: float = 0.0

    @property
    def ranks(self) -> int:
        """Workers of all engines."""
        return self.count * self.tensor_parallel

    @property
    def num_gpus(self) -> float:
        """GPUs that Ray has to provide."""
        return self.ranks * self.gpus_per_rank


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """The resolved placement.

    Attributes:
        device: `cpu` or `gpu`, never `auto`.
        policy: engines of the policy.
        users: engines that speak for the simulated users.
        learner_ranks: data-parallel ranks of the policy learner.
        critic_ranks: data-parallel ranks of the critic learner; 0 where there is none.
        reward_replicas: reward service actors.
        gpus_per_learner_rank: GPUs that Ray reserves for each rank of policy or critic; 0 on CPUs.
        threads: threads of each learner rank, and on CPUs of each engine. On GPUs the cores are divided among
            the learner ranks, which step offloaded optimizers on the host; engines choose their own.
        weight_transfer: vLLM weight-transfer backend, "shared_file" or "nccl".
    """

    device: Device
    policy: EngineGroup
    users: EngineGroup
    learner_ranks: int
    critic_ranks: int
    reward_replicas: int
    gpus_per_learner_rank: float
    threads: int
    weight_transfer: str

    @property
    def num_gpus(self) -> float:
        """GPUs that Ray has to provide in all."""
        return self.policy.num_gpus + self.users.num_gpus + self.learner_gpus

    @property
    def learner_gpus(self) -> float:
        """GPUs of all learner ranks."""
        return (self.learner_ranks + self.critic_ranks) * self.gpus_per_learner_rank

    @property
    def ranks(self) -> dict[str, str]:
        """Ranks of each learner by its actors' name, as a checkpoint notes them."""
        critic = {"critic_learner": str(self.critic_ranks)} if self.critic_ranks else {}
        return {"policy_learner": str(self.learner_ranks)} | critic

    def require_ranks(self, checkpoint: str, written: Mapping[str, str]) -> None:
        """Refuse to go on from `checkpoint`, which notes `written`, with other ranks: each has saved its own
        shard of the optimizer's state.

        Raises:
            DataError: names a learner, its ranks there and here, and the option.
        """
        for learner, ranks in self.ranks.items():
            if written.get(learner, ranks) != ranks:
                total = sum(int(written.get(name, here)) for name, here in self.ranks.items())
                raise DataError(
                    f"{checkpoint} was written with {learner} ranks={written[learner]} and this run has "
                    f"{ranks}; use cluster.learner_ranks={total}, with cluster.engines, or another output_dir"
                )

    @property
    def shares_gpus(self) -> bool:
        """Whether an engine may be on a GPU with other engines or learners."""
        fewest = min(self.policy.gpus_per_rank, self.users.gpus_per_rank or 1.0)
        return self.device is Device.gpu and fewest < 1

    @property
    def split(self) -> str:
        """How the GPUs are split, as text."""
        users = f" + users {self.users.num_gpus:g}" if self.users.count else ""
        return f"policy engines {self.policy.num_gpus:g}{users} + learners {self.learner_gpus:g}"

    def rows(self) -> list[str]:
        """One line a component: its actor names and what it holds."""
        on_cpu = self.device is Device.cpu
        cores = f"{self.threads} threads, sharing the cores in turn"

        def engines(name: str, group: EngineGroup) -> list[str]:
            on_gpu = (
                f"{group.tensor_parallel} x {group.gpus_per_rank:g} GPU, {group.gpu_memory_fraction:.0%} of "
                f"its memory"
            )
            return [f"{_names(name, group.count)}: {cores if on_cpu else on_gpu}"] if group.count else []

        learner = cores if on_cpu else f"{self.gpus_per_learner_rank:g} GPU"
        return [
            *engines("rollout_engine", self.policy),
            *engines("user_engine", self.users),
            f"{_names('policy_learner', self.learner_ranks)}: {learner}",
            *([f"{_names('critic_learner', self.critic_ranks)}: {learner}"] if self.critic_ranks else []),
            f"{_names('reward_service', self.reward_replicas)}: 1 thread",
            f"weights travel by {self.weight_transfer}",
        ]


def _names(kind: str, count: int) -> str:
    return f"{kind}_0" if count == 1 else f"{kind}_0 to {kind}_{count - 1}, each"


def resolve_layout(config: RunConfig, *, num_gpus: int, num_cpus: int, num_nodes: int = 1) -> Layout:
    """Place everything on what there is.

    Args:
        config: the run's configuration.
        num_gpus: GPUs of all nodes.
        num_cpus: cores of all nodes.
        num_nodes: nodes that Ray may place actors on.

    Raises:
        ResourceError: not enough GPUs, or more nodes than one where weights travel by file; says what is
            needed, what is there, and what would run here.
        ConfigError: shares of GPUs would let members of one group meet on a GPU.
    """
    cluster = config.cluster
    simulator = config.simulator
    if cluster.device is Device.cpu:
        layout = _on_cpu(cluster, simulator, config.has_critic, num_cpus)
    else:
        layout = _on_gpus(cluster, simulator, config.has_critic, num_gpus, num_cpus)
    # Every engine reads the file that the learner writes, so all of them have to be on one machine.
    if layout.weight_transfer == "shared_file" and num_nodes > 1:
        whole = (
            ""
            if layout.device is Device.cpu
            else ", or give every engine and learner rank a whole GPU (cluster.gpus_per_*)"
        )
        raise ResourceError(
            f"weights travel by a file in one node's memory here and Ray's cluster has {num_nodes} nodes; "
            f"leave cluster.address and RAY_ADDRESS unset, so that Ray starts on this machine{whole}"
        )
    return layout


def _on_gpus(
    cluster: ClusterConfig, simulator: SimulatorConfig, has_critic: bool, num_gpus: int, num_cpus: int
) -> Layout:
    """Every GPU is held by what Ray reserves it for, whole or in fixed fractions."""
    if cluster.device is Device.auto and num_gpus == 0:
        raise ResourceError(
            "this run needs at least 1 GPU and Ray sees none; on this machine, run: launch/local.sh, or add "
            "+on=cpu"
        )
    policy, users, ranks, gpus = (
        _derived(cluster, simulator, num_gpus) if cluster.engines == 0 else _as_configured(cluster, simulator)
    )
    policy_ranks, critic_ranks, gpus_per_learner_rank = _split_ranks(ranks, gpus, has_critic)
    _require_apart("cluster.gpus_per_engine_rank", policy.gpus_per_rank, policy.tensor_parallel)
    _require_apart("simulator.engine.gpus_per_rank", users.gpus_per_rank, users.tensor_parallel)
    _require_apart("cluster.gpus_per_learner_rank", gpus, policy_ranks)
    layout = Layout(
        device=Device.gpu,
        policy=policy,
        users=users,
        learner_ranks=policy_ranks,
        critic_ranks=critic_ranks,
        reward_replicas=simulator.replicas,
        gpus_per_learner_rank=gpus_per_learner_rank,
        threads=max(num_cpus // max(policy_ranks + critic_ranks, 1), 1),
        # NCCL refuses two members of a group on one GPU; the policy's first rank and its engines form one.
        weight_transfer="nccl" if min(policy.gpus_per_rank, gpus) == 1 else "shared_file",
    )
    # Fractions such as 0.2 + 0.3 + 0.5 need not add up to 1 exactly.
    if ranks < 1 or layout.num_gpus > num_gpus + 1e-6:
        way_out = (
            "launch/local.sh, or add +on=cpu"
            if num_gpus == 0
            else f"the same with +on={'node8' if num_gpus >= 8 else 'gpu1'}"
        )
        raise ResourceError(
            f"this run needs {layout.num_gpus:g} GPUs ({layout.split}) and Ray sees {num_gpus}; on this "
            f"machine, run: {way_out}"
        )
    return layout


def _require_apart(key: str, gpus_per_rank: float, members: int) -> None:
    """Raise `ConfigError` where two of a group's `members`, which NCCL connects, could meet on one GPU: it
    refuses that when they start."""
    if members > 1 and not gpus_per_rank > 0.5:
        raise ConfigError(
            f"{key}={gpus_per_rank}: use more than 0.5, so that no two of {members} ranks that NCCL connects "
            f"share a GPU"
        )


def _as_configured(
    cluster: ClusterConfig, simulator: SimulatorConfig
) -> tuple[EngineGroup, EngineGroup, int, float]:
    """(policy's engines, users' engines, learner ranks, GPUs a learner rank) as the configuration has
    them."""
    policy = EngineGroup(
        count=cluster.engines,
        tensor_parallel=cluster.tensor_parallel,
        gpus_per_rank=cluster.gpus_per_engine_rank,
        gpu_memory_fraction=cluster.gpu_memory_fraction,
    )
    users = _users(simulator, max(simulator.engine.engines, 1))
    return policy, users, cluster.learner_ranks, cluster.gpus_per_learner_rank


def _users(simulator: SimulatorConfig, count: int) -> EngineGroup:
    """The users' engines on GPUs as configured, `count` of them where the backend has any."""
    engine = simulator.engine
    # Users that are rules, or a chat model behind an endpoint, take no GPU of the cluster.
    if not simulator.uses_engines:
        return EngineGroup(count=0)
    return EngineGroup(
        count=count,
        tensor_parallel=engine.tensor_parallel,
        gpus_per_rank=engine.gpus_per_rank,
        gpu_memory_fraction=engine.gpu_memory_fraction,
    )


def _derived(
    cluster: ClusterConfig, simulator: SimulatorConfig, num_gpus: int
) -> tuple[EngineGroup, EngineGroup, int, float]:
    """The same from the number of GPUs: a quarter for the users' engines, where there are any, and half of
    the rest for the policy's."""
    # Memory fractions are less than what Ray reserves, since nothing holds a process to its part of a GPU.
    # On a single GPU learners get most: they hold gradients and optimizer states beside the weights.
    if num_gpus == 1 and simulator.uses_engines:
        users = EngineGroup(count=1, gpus_per_rank=0.3, gpu_memory_fraction=0.25)
        return EngineGroup(count=1, gpus_per_rank=0.2, gpu_memory_fraction=0.15), users, 1, 0.5
    derived = max(num_gpus // 4 // simulator.engine.tensor_parallel, 1)
    users = _users(simulator, simulator.engine.engines or derived)
    left = num_gpus - math.ceil(users.num_gpus)
    if left == 1:
        return EngineGroup(count=1, gpus_per_rank=0.4, gpu_memory_fraction=0.35), users, 1, 0.6
    policy = EngineGroup(
        count=max(left // 2 // cluster.tensor_parallel, 1),
        tensor_parallel=cluster.tensor_parallel,
        gpus_per_rank=1.0,
        gpu_memory_fraction=0.85,
    )
    return policy, users, left - policy.ranks, 1.0


def _split_ranks(ranks: int, gpus: float, has_critic: bool) -> tuple[int, int, float]:
    """(policy ranks, critic ranks, GPUs a rank) of `ranks` learner ranks with `gpus` each."""
    if not has_critic:
        return ranks, 0, gpus
    if ranks == 1:
        # Policy and critic take turns, so one GPU serves both.
        return 1, 1, gpus / 2
    return ranks - ranks // 2, ranks // 2, gpus


def _on_cpu(cluster: ClusterConfig, simulator: SimulatorConfig, has_critic: bool, num_cpus: int) -> Layout:
    """Engines rest while learners work and the other way round, so each may use every core."""
    policy_ranks, critic_ranks, _ = _split_ranks(max(cluster.learner_ranks, 1), 0.0, has_critic)
    return Layout(
        device=Device.cpu,
        policy=EngineGroup(count=max(cluster.engines, 1)),
        users=EngineGroup(count=max(simulator.engine.engines, 1) if simulator.uses_engines else 0),
        learner_ranks=policy_ranks,
        critic_ranks=critic_ranks,
        reward_replicas=simulator.replicas,
        gpus_per_learner_rank=0.0,
        threads=cluster.cpu_threads or num_cpus,
        weight_transfer="shared_file",
    )
