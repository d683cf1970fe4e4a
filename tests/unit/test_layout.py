"""Placement arithmetic."""

import pytest

from rlver_dist.choices import Device
from rlver_dist.cluster.layout import resolve_layout
from rlver_dist.config import ClusterConfig
from rlver_dist.errors import ResourceError


def layout(cluster: ClusterConfig, gpus: int, cpus: int = 2, has_critic: bool = False):
    return resolve_layout(cluster, has_critic=has_critic, reward_replicas=1, num_gpus=gpus, num_cpus=cpus)


@pytest.mark.parametrize(("gpus", "engines", "ranks"), [(2, 1, 1), (3, 1, 2), (8, 4, 4), (32, 16, 16)])
def test_auto_gives_half_the_gpus_to_engines(gpus, engines, ranks):
    placed = layout(ClusterConfig(), gpus)
    assert (placed.engines, placed.learner_ranks, placed.num_gpus) == (engines, ranks, gpus)
    assert placed.weight_transfer == "nccl"


def test_auto_shares_a_single_gpu():
    placed = layout(ClusterConfig(), 1)
    assert (placed.engines, placed.learner_ranks) == (1, 1)
    assert placed.num_gpus == pytest.approx(1.0)
    assert placed.weight_transfer == "shared_file"


def test_auto_with_tensor_parallel_counts_gpus():
    placed = layout(ClusterConfig(tensor_parallel=2), 8)
    assert (placed.engines, placed.learner_ranks, placed.num_gpus) == (2, 4, 8)


def test_cpu_shares_all_cores_in_turn():
    placed = layout(ClusterConfig(device=Device.cpu, engines=1, learner_ranks=2), 0, cpus=6)
    assert (placed.engines, placed.learner_ranks, placed.threads, placed.num_gpus) == (1, 2, 6, 0)
    assert placed.weight_transfer == "shared_file"


@pytest.mark.parametrize(
    ("cluster", "gpus", "words"),
    [
        (ClusterConfig(), 0, ["at least 1 GPU", "Ray sees none", "+on=cpu"]),
        (ClusterConfig(device=Device.gpu, engines=4, learner_ranks=4), 0, ["needs 8 GPUs", "Ray sees 0", "+on=cpu"]),
        (ClusterConfig(device=Device.gpu, engines=4, learner_ranks=4), 6, ["needs 8 GPUs", "Ray sees 6", "+on=gpu1"]),
    ],
)
def test_too_few_gpus_say_what_is_needed_there_and_would_run(cluster, gpus, words):
    with pytest.raises(ResourceError) as caught:
        layout(cluster, gpus)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("ranks", "policy", "critic"), [(6, 3, 3), (5, 3, 2), (2, 1, 1)])
def test_a_critic_takes_half_of_the_learner_ranks(ranks, policy, critic):
    placed = layout(ClusterConfig(device=Device.gpu, engines=2, learner_ranks=ranks), 8, has_critic=True)
    assert (placed.learner_ranks, placed.critic_ranks, placed.num_gpus) == (policy, critic, 2 + ranks)
    assert placed.weight_transfer == "nccl"


def test_a_single_learner_rank_shares_its_gpu_with_the_critic():
    cluster = ClusterConfig(device=Device.gpu, engines=1, learner_ranks=1, gpus_per_engine_rank=0.4, gpus_per_learner_rank=0.6)
    placed = layout(cluster, 1, has_critic=True)
    assert (placed.learner_ranks, placed.critic_ranks) == (1, 1)
    assert placed.num_gpus == pytest.approx(1.0) and placed.gpus_per_learner_rank == pytest.approx(0.3)


def test_a_critic_beside_the_policy_does_not_cut_the_engines_off():
    placed = layout(ClusterConfig(), 2, has_critic=True)
    assert (placed.engines, placed.learner_ranks, placed.critic_ranks) == (1, 1, 1)
    assert placed.gpus_per_learner_rank == 0.5 and placed.weight_transfer == "nccl"


def test_a_critic_on_cpus_is_an_actor_of_its_own():
    placed = layout(ClusterConfig(device=Device.cpu), 0, has_critic=True)
    assert (placed.learner_ranks, placed.critic_ranks) == (1, 1)
    assert any(row.startswith("critic_learner_0") for row in placed.rows())
