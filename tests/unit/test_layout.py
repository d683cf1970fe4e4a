"""Placement arithmetic."""

import pytest

from rlver_dist.cluster.layout import resolve_layout
from rlver_dist.config import ClusterConfig, Device
from rlver_dist.errors import ResourceError


def layout(cluster: ClusterConfig, gpus: int, cpus: int = 2):
    return resolve_layout(cluster, reward_replicas=1, num_gpus=gpus, num_cpus=cpus)


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
