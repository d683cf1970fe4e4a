"""Options of where things run."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.enums import Device
from rlver_dist.errors import ConfigError

GIB = 1024**3
"""Bytes of a GiB, the unit of the options on memory."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where things run."""

    device: Device = Device.auto
    """What engines and learners compute on."""
    address: str | None = None
    """Ray cluster to join; null joins the one in RAY_ADDRESS, else starts one on this machine."""
    engines: int = 0
    """vLLM engines for the policy; 0 derives engines, ranks and their shares of the GPUs that Ray sees: the
    three options on shares and memory below are then not used."""
    tensor_parallel: int = 1
    """GPUs an engine."""
    learner_ranks: int = 0
    """Data-parallel ranks of the learners; 0 derives them. With PPO half of them, rounded down, train the
    critic; a single one's share of a GPU is halved between policy and critic."""
    gpus_per_engine_rank: float = 1.0
    """GPUs that Ray reserves for each engine worker; below 1 lets an engine and a learner share one, on one
    node. With tensor_parallel above 1 it has to be above 0.5, since NCCL connects no two workers on one
    GPU."""
    gpus_per_learner_rank: float = 1.0
    """GPUs that Ray reserves for each learner rank; above 0.5 where policy or critic has several,
    likewise."""
    gpu_memory_fraction: float = 0.85
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gib: int = 2
    """On CPUs: memory of an engine's key-value cache, GiB."""
    cpu_threads: int = 0
    """On CPUs: threads of each engine and learner rank, which work in turn and share the cores; 0 takes all
    cores."""
    dashboard: bool = True
    """Serve the Ray dashboard on loopback where the run starts Ray itself."""

    def __post_init__(self) -> None:
        if self.engines < 0:
            raise ConfigError(f"cluster.engines={self.engines}: use 0 or more")
        if self.learner_ranks < 0:
            raise ConfigError(f"cluster.learner_ranks={self.learner_ranks}: use 0 or more")
        if self.cpu_threads < 0:
            raise ConfigError(f"cluster.cpu_threads={self.cpu_threads}: use 0 or more")
        if self.tensor_parallel < 1:
            raise ConfigError(f"cluster.tensor_parallel={self.tensor_parallel}: use 1 or more")
        if self.kv_cache_gib < 1:
            raise ConfigError(f"cluster.kv_cache_gib={self.kv_cache_gib}: use 1 or more")
        for key in ("gpus_per_engine_rank", "gpus_per_learner_rank", "gpu_memory_fraction"):
            fraction = getattr(self, key)
            if not 0 < fraction <= 1:
                raise ConfigError(f"cluster.{key}={fraction}: use a share above 0, up to 1")
        if (self.engines == 0) != (self.learner_ranks == 0):
            raise ConfigError(
                f"cluster.learner_ranks={self.learner_ranks}: set both cluster.engines and "
                f"cluster.learner_ranks, or neither"
            )
