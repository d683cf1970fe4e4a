"""Learner ranks in spawned processes of their own, since DeepSpeed keeps process-wide state."""

import itertools
import socket
import time

import torch

from rlver_dist.config.enums import Device, Precision
from rlver_dist.learner.critic import CriticLearner, CriticSettings
from rlver_dist.learner.policy import PolicyLearner
from rlver_dist.learner.policy_models import PolicySettings
from rlver_dist.learner.rank import RankPlace
from tests.timing import hang_limit

SETTINGS = {
    f"stage{stage}{'_recompute' if recompute else ''}{'_offload' if offload else ''}": dict(
        zero_stage=stage, gradient_checkpointing=recompute, offload_optimizer=offload
    )
    for stage, recompute, offload in itertools.product(range(4), (False, True), (False, True))
    if stage or not offload
}
"""Every way in which DeepSpeed can be asked to train, by name."""
BFLOAT16 = {
    f"bfloat16_{name}": dict(dtype=Precision.bfloat16, **changes)
    for name, changes in SETTINGS.items()
    if changes["zero_stage"]
}
SHARDED = {name: changes for name, changes in SETTINGS.items() if changes["zero_stage"] >= 2}
"""Those in which ranks meet within a step, so that one without work could leave the others waiting."""
NAMES = {1: ("one_rank",), 2: ("two_ranks_0", "two_ranks_1")}
"""Where each rank writes what it found, by the number of ranks."""
TIMEOUT_S = 900
"""Many times what the slowest takes on two quiet cores; ranks that wait for each other would do so for half
an hour."""


def start_policy(config, rank, world_size, port, warm_start=None):
    """One rank of a run's policy learner."""
    settings = PolicySettings(
        model=config.model,
        algorithm=config.algorithm,
        learner=config.learner,
        temperature=config.rollout.temperature,
        seed=config.seed,
        warm_start=warm_start,
    )
    return _started(PolicyLearner(settings, _place(rank, world_size)), port)


def start_critic(config, rank, world_size, port):
    """One rank of a run's critic."""
    settings = CriticSettings(
        model=config.model,
        critic=config.critic,
        updates_per_iteration=config.algorithm.updates_per_iteration,
        seed=config.seed,
    )
    return _started(CriticLearner(settings, _place(rank, world_size)), port)


def _place(rank, world_size):
    return RankPlace(rank=rank, world_size=world_size, device=Device.cpu, num_threads=1)


def _started(learner, port):
    learner.start("127.0.0.1", port)
    return learner


def run_jobs(build, jobs, group):
    """What each job, a configuration and the work on it, gives, by its name.

    ZeRO 3 comes last: with it DeepSpeed replaces torch's linear function for all that the process does
    afterwards. `group` is the learner's in the configuration; work is called with `build` and the
    configuration.
    """
    order = sorted(jobs, key=lambda name: getattr(jobs[name][0], group).zero_stage)
    return {name: work(build, config) for name in order for config, work in [jobs[name]]}


def run_ranks(target, world_size, folder):
    """Run `target(rank, port, folder)` on every rank at once; returns what each one saved under its name in
    `NAMES`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(target, (port, str(folder)), nprocs=world_size, join=False)
    limit = hang_limit(TIMEOUT_S)
    deadline = time.monotonic() + limit
    try:
        # Returns after each rank that ends, and raises what a rank raised.
        while not context.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                stuck = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                raise TimeoutError(
                    f"{target.__module__}.{target.__name__}: ranks {stuck} of {world_size} still run after "
                    f"{limit:.0f} s"
                )
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in NAMES[world_size]]
