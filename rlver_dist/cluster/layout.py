"""Which device holds what: pure arithmetic, no Ray.

A layout is derived from the configuration and the number of GPUs and cores; `session.py` asks Ray for them, `check.py` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.choices import Device
from rlver_dist.config import ClusterConfig
from rlver_dist.errors import ResourceError


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """The resolved placement.

    Attributes:
        device: "cpu" or "gpu".
        engines: vLLM engines of the policy.
        tensor_parallel: GPUs an engine.
        learner_ranks: data-parallel ranks of the policy learner.
        critic_ranks: data-parallel ranks of the critic learner; 0 where there is none.
        reward_replicas: reward service actors.
        gpus_per_engine_rank: GPUs that Ray reserves for each of an engine's workers; 0 on CPUs.
        gpus_per_learner_rank: GPUs that Ray reserves for each rank of policy or critic; 0 on CPUs.
        gpu_memory_fraction: share of a GPU's memory an engine takes.
        threads: threads of each engine and each learner rank on CPUs; 0 leaves it to the libraries (GPUs).
        weight_transfer: vLLM weight-transfer backend, "shared_file" or "nccl".
    """

    device: str
    engines: int
    tensor_parallel: int
    learner_ranks: int
    critic_ranks: int
    reward_replicas: int
    gpus_per_engine_rank: float
    gpus_per_learner_rank: float
    gpu_memory_fraction: float
    threads: int
    weight_transfer: str

    @property
    def num_gpus(self) -> float:
        """GPUs that Ray has to provide in all."""
        learner_gpus = (self.learner_ranks + self.critic_ranks) * self.gpus_per_learner_rank
        return self.engines * self.tensor_parallel * self.gpus_per_engine_rank + learner_gpus

    def rows(self) -> list[str]:
        """One line a component: its actor names and what it holds."""
        if self.device == "cpu":
            share = f"{self.threads} threads, sharing the cores in turn"
            engine = learner = share
        else:
            engine = f"{self.tensor_parallel} x {self.gpus_per_engine_rank:g} GPU, {self.gpu_memory_fraction:.0%} of its memory"
            learner = f"{self.gpus_per_learner_rank:g} GPU"
        return [
            f"{_names('rollout_engine', self.engines)}: {engine}",
            f"{_names('policy_learner', self.learner_ranks)}: {learner}",
            *([f"{_names('critic_learner', self.critic_ranks)}: {learner}"] if self.critic_ranks else []),
            f"{_names('reward_service', self.reward_replicas)}: 1 thread",
            f"weights travel by {self.weight_transfer}",
        ]


def _names(kind: str, count: int) -> str:
    return f"{kind}_0" if count == 1 else f"{kind}_0 to {kind}_{count - 1}, each"


def _derived(num_gpus: int, tensor_parallel: int) -> tuple[int, int, float, float, float]:
    """(engines, learner ranks, GPUs an engine worker, GPUs a learner rank, engine memory share): half the GPUs for each."""
    if num_gpus == 1:
        return 1, 1, 0.4, 0.6, 0.35
    engines = max(num_gpus // 2 // tensor_parallel, 1)
    return engines, num_gpus - engines * tensor_parallel, 1.0, 1.0, 0.85


def _split_ranks(ranks: int, share: float, has_critic: bool) -> tuple[int, int, float]:
    """(policy ranks, critic ranks, GPUs a rank) of `ranks` learner ranks with `share` of a GPU each."""
    if not has_critic:
        return ranks, 0, share
    if ranks == 1:
        return 1, 1, share / 2
    return ranks - ranks // 2, ranks // 2, share


def resolve_layout(cluster: ClusterConfig, *, has_critic: bool, reward_replicas: int, num_gpus: int, num_cpus: int) -> Layout:
    """Place everything on what there is.

    Raises:
        ResourceError: not enough GPUs; says what is needed, what is there, and the command that would run here.
    """
    if cluster.device is Device.auto and num_gpus == 0:
        raise ResourceError("this run needs at least 1 GPU and Ray sees none; on this machine, run: launch/local.sh, or add +on=cpu")
    if cluster.device is Device.cpu:
        return _on_cpu(cluster, has_critic, reward_replicas, num_cpus)
    shares = (cluster.gpus_per_engine_rank, cluster.gpus_per_learner_rank, cluster.gpu_memory_fraction)
    engines, ranks = cluster.engines, cluster.learner_ranks
    if engines == 0:
        engines, ranks, *derived_shares = _derived(num_gpus, cluster.tensor_parallel)
        shares = (derived_shares[0], derived_shares[1], derived_shares[2])
    policy_ranks, critic_ranks, learner_share = _split_ranks(ranks, shares[1], has_critic)
    layout = Layout(
        device="gpu",
        engines=engines,
        tensor_parallel=cluster.tensor_parallel,
        learner_ranks=policy_ranks,
        critic_ranks=critic_ranks,
        reward_replicas=reward_replicas,
        gpus_per_engine_rank=shares[0],
        gpus_per_learner_rank=learner_share,
        gpu_memory_fraction=shares[2],
        threads=0,
        # NCCL refuses two members of a group on one GPU; the policy's first rank and the engines form one.
        weight_transfer="nccl" if min(shares[0], shares[1]) == 1 else "shared_file",
    )
    if ranks < 1 or layout.num_gpus > num_gpus + 1e-6:
        way_out = "launch/local.sh, or add +on=cpu" if num_gpus == 0 else f"the same with +on={'node8' if num_gpus >= 8 else 'gpu1'}"
        raise ResourceError(
            f"this run needs {layout.num_gpus:g} GPUs ({engines} engines x {cluster.tensor_parallel}, {ranks} learner ranks) and Ray sees "
            f"{num_gpus}; on this machine, run: {way_out}"
        )
    return layout


def _on_cpu(cluster: ClusterConfig, has_critic: bool, reward_replicas: int, num_cpus: int) -> Layout:
    """Engines rest while learners work and the other way round, so each may use every core."""
    policy_ranks, critic_ranks, _ = _split_ranks(max(cluster.learner_ranks, 1), 0.0, has_critic)
    return Layout(
        device="cpu",
        engines=max(cluster.engines, 1),
        tensor_parallel=1,
        learner_ranks=policy_ranks,
        critic_ranks=critic_ranks,
        reward_replicas=reward_replicas,
        gpus_per_engine_rank=0.0,
        gpus_per_learner_rank=0.0,
        gpu_memory_fraction=0.0,
        threads=cluster.cpu_threads or num_cpus,
        weight_transfer="shared_file",
    )
