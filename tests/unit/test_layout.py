"""Placement arithmetic."""

import pytest

from rlver_dist.cluster.layout import resolve_layout
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import AlgorithmName, Device, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig, UserEngineConfig
from rlver_dist.errors import ConfigError, DataError, ResourceError

PPO = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1)


def layout(
    cluster: ClusterConfig,
    gpus: int,
    cpus: int = 2,
    has_critic: bool = False,
    users: UserEngineConfig | None = None,
):
    simulator = (
        SimulatorConfig() if users is None else SimulatorConfig(backend=SimulatorBackend.vllm, engine=users)
    )
    config = RunConfig(
        cluster=cluster, algorithm=PPO if has_critic else AlgorithmConfig(), simulator=simulator
    )
    return resolve_layout(config, num_gpus=gpus, num_cpus=cpus)


@pytest.mark.parametrize(("gpus", "engines", "ranks"), [(2, 1, 1), (3, 1, 2), (8, 4, 4), (32, 16, 16)])
def test_auto_gives_half_the_gpus_to_engines(gpus, engines, ranks):
    placed = layout(ClusterConfig(), gpus)
    assert (placed.policy.count, placed.learner_ranks, placed.num_gpus) == (engines, ranks, gpus)
    assert placed.weight_transfer == "nccl"


def test_auto_shares_a_single_gpu():
    placed = layout(ClusterConfig(), 1)
    assert (placed.policy.count, placed.learner_ranks) == (1, 1)
    assert placed.num_gpus == pytest.approx(1.0)
    assert placed.weight_transfer == "shared_file"


def test_auto_with_tensor_parallel_counts_gpus():
    placed = layout(ClusterConfig(tensor_parallel=2), 8)
    assert (placed.policy.count, placed.learner_ranks, placed.num_gpus) == (2, 4, 8)


def test_cpu_shares_all_cores_in_turn():
    placed = layout(ClusterConfig(device=Device.cpu, engines=1, learner_ranks=2), 0, cpus=6)
    assert (placed.policy.count, placed.learner_ranks, placed.threads, placed.num_gpus) == (1, 2, 6, 0)
    assert placed.weight_transfer == "shared_file"


@pytest.mark.parametrize(
    ("cluster", "gpus", "words"),
    [
        (ClusterConfig(), 0, ["at least 1 GPU", "Ray sees none", "+on=cpu"]),
        (
            ClusterConfig(device=Device.gpu, engines=4, learner_ranks=4),
            0,
            ["needs 8 GPUs", "Ray sees 0", "+on=cpu"],
        ),
        (
            ClusterConfig(device=Device.gpu, engines=4, learner_ranks=4),
            6,
            ["needs 8 GPUs", "Ray sees 6", "+on=gpu1"],
        ),
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
    cluster = ClusterConfig(
        device=Device.gpu, engines=1, learner_ranks=1, gpus_per_engine_rank=0.4, gpus_per_learner_rank=0.6
    )
    placed = layout(cluster, 1, has_critic=True)
    assert (placed.learner_ranks, placed.critic_ranks) == (1, 1)
    assert placed.num_gpus == pytest.approx(1.0) and placed.gpus_per_learner_rank == pytest.approx(0.3)


def test_a_critic_beside_the_policy_does_not_cut_the_engines_off():
    placed = layout(ClusterConfig(), 2, has_critic=True)
    assert (placed.policy.count, placed.learner_ranks, placed.critic_ranks) == (1, 1, 1)
    assert placed.gpus_per_learner_rank == 0.5 and placed.weight_transfer == "nccl"


def test_a_critic_on_cpus_is_an_actor_of_its_own():
    placed = layout(ClusterConfig(device=Device.cpu), 0, has_critic=True)
    assert (placed.learner_ranks, placed.critic_ranks) == (1, 1)
    assert any(row.startswith("critic_learner_0") for row in placed.rows())


@pytest.mark.parametrize(
    ("gpus", "policy", "users", "ranks", "transfer"),
    [(2, 1, 1, 1, "shared_file"), (3, 1, 1, 1, "nccl"), (8, 3, 2, 3, "nccl"), (32, 12, 8, 12, "nccl")],
)
def test_auto_gives_a_quarter_to_the_users_engines(gpus, policy, users, ranks, transfer):
    placed = layout(ClusterConfig(), gpus, users=UserEngineConfig())
    assert (placed.policy.count, placed.users.count, placed.learner_ranks, placed.num_gpus) == (
        policy,
        users,
        ranks,
        gpus,
    )
    assert placed.weight_transfer == transfer


def test_auto_shares_a_single_gpu_with_the_users():
    placed = layout(ClusterConfig(), 1, users=UserEngineConfig())
    assert placed.num_gpus == pytest.approx(1.0) and placed.shares_gpus
    assert placed.policy.gpu_memory_fraction + placed.users.gpu_memory_fraction <= 0.5


def test_users_engines_beside_configured_ones_are_counted_and_shown():
    cluster = ClusterConfig(device=Device.gpu, engines=8, learner_ranks=16)
    users = UserEngineConfig(engines=4, tensor_parallel=2)
    placed = layout(cluster, 32, users=users)
    assert (placed.num_gpus, placed.split) == (32, "policy engines 8 + users 8 + learners 16")
    assert not placed.shares_gpus
    assert "user_engine_0 to user_engine_3, each: 2 x 1 GPU, 85% of its memory" in placed.rows()
    with pytest.raises(
        ResourceError, match=r"needs 32 GPUs \(policy engines 8 \+ users 8 \+ learners 16\) and Ray sees 24"
    ):
        layout(cluster, 24, users=users)


SHARED = dict(gpus_per_engine_rank=0.4, gpus_per_learner_rank=0.6)


@pytest.mark.parametrize(
    ("cluster", "users", "words"),
    [
        (
            dict(engines=1, learner_ranks=2, gpus_per_learner_rank=0.5),
            None,
            r"^cluster\.gpus_per_learner_rank=0\.5: use more than 0\.5",
        ),
        (
            dict(engines=1, learner_ranks=1, tensor_parallel=2, gpus_per_engine_rank=0.2),
            None,
            r"^cluster\.gpus_per_engine_rank=0\.2: ",
        ),
        (
            dict(engines=1, learner_ranks=1),
            UserEngineConfig(tensor_parallel=2, gpus_per_rank=0.5),
            r"^simulator\.engine\.gpus_per_rank=0\.5",
        ),
    ],
)
def test_shares_that_let_two_ranks_of_a_group_meet_are_refused(cluster, users, words):
    with pytest.raises(ConfigError, match=words):
        layout(ClusterConfig(device=Device.gpu, **cluster), 8, users=users)


def test_shares_that_keep_the_ranks_of_a_group_apart_are_taken():
    placed = layout(ClusterConfig(device=Device.gpu, engines=2, learner_ranks=2, **SHARED), 2)
    assert placed.num_gpus == pytest.approx(2) and placed.weight_transfer == "shared_file"
    # Of two learner ranks PPO makes a policy's and a critic's, which are groups of their own.
    halves = ClusterConfig(device=Device.gpu, engines=1, learner_ranks=2, gpus_per_learner_rank=0.5)
    assert layout(halves, 2, has_critic=True).learner_ranks == 1


@pytest.mark.parametrize(
    ("cluster", "gpus", "way_out"),
    [
        (ClusterConfig(device=Device.cpu), 0, r"Ray starts on this machine$"),
        (
            ClusterConfig(device=Device.gpu, engines=1, learner_ranks=1, **SHARED),
            8,
            r", or give every engine and learner rank a whole GPU",
        ),
    ],
)
def test_weights_that_travel_by_file_take_one_node(cluster, gpus, way_out):
    config = RunConfig(cluster=cluster)
    assert resolve_layout(config, num_gpus=gpus, num_cpus=2).weight_transfer == "shared_file"
    with pytest.raises(
        ResourceError, match=rf"Ray's cluster has 3 nodes; leave cluster\.address .*{way_out}"
    ):
        resolve_layout(config, num_gpus=gpus, num_cpus=2, num_nodes=3)


def test_whole_gpus_may_lie_on_several_nodes():
    assert resolve_layout(RunConfig(), num_gpus=16, num_cpus=2, num_nodes=2).weight_transfer == "nccl"


def test_a_checkpoint_of_other_ranks_is_refused():
    placed = layout(ClusterConfig(device=Device.cpu, engines=1, learner_ranks=5), 0, has_critic=True)
    assert placed.ranks == {"policy_learner": "3", "critic_learner": "2"}
    placed.require_ranks("step_1", {"model.path": "tiny"} | placed.ranks)
    placed.require_ranks("step_1", {"model.path": "tiny"})
    words = (
        r"^step_1 was written with critic_learner ranks=3 and this run has 2; use cluster\.learner_ranks=6,"
    )
    with pytest.raises(DataError, match=words):
        placed.require_ranks("step_1", {"policy_learner": "3", "critic_learner": "3"})
    alone = layout(ClusterConfig(device=Device.cpu, engines=1, learner_ranks=5), 0)
    with pytest.raises(
        DataError, match=r"policy_learner ranks=3 and this run has 5; use cluster\.learner_ranks=3,"
    ):
        alone.require_ranks("step_1", placed.ranks)


def test_without_the_backend_there_are_no_users_engines():
    cluster = ClusterConfig(device=Device.gpu, engines=2, learner_ranks=6)
    placed = layout(cluster, 8)
    assert (placed.users.count, placed.num_gpus) == (0, 8)
    assert not any("user_engine" in row for row in placed.rows())


def test_users_engines_on_cpus_share_the_cores_too():
    placed = layout(ClusterConfig(device=Device.cpu), 0, cpus=4, users=UserEngineConfig(engines=2))
    assert (placed.users.count, placed.num_gpus) == (2, 0)
    assert "user_engine_0 to user_engine_1, each: 4 threads, sharing the cores in turn" in placed.rows()
