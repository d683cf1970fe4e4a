"""Which bundle is whose: the order in which GPUs are reserved is the order in which actors take them."""

from rlver_dist.choices import Device, SimulatorBackend
from rlver_dist.cluster.layout import Layout, resolve_layout
from rlver_dist.cluster.place import _engine_options, _learner_options
from rlver_dist.cluster.session import bundles
from rlver_dist.config import ClusterConfig, RunConfig
from rlver_dist.simulator_config import SimulatorConfig, UserEngineConfig


def layout(users: UserEngineConfig, **cluster) -> Layout:
    config = RunConfig(
        cluster=ClusterConfig(device=Device.gpu, **cluster), simulator=SimulatorConfig(backend=SimulatorBackend.vllm, engine=users)
    )
    return resolve_layout(config, num_gpus=32, num_cpus=8)


def test_engines_of_several_gpus_take_the_bundles_after_the_policys():
    placed = layout(UserEngineConfig(engines=2, tensor_parallel=2), engines=3, learner_ranks=4)
    assert [bundle["GPU"] for bundle in bundles(placed)] == [1.0] * (3 + 4 + 4)
    options = _engine_options("user_engine", placed, placed.users, None, placed.policy.ranks)
    assert [one["name"] for one in options] == ["user_engine_0", "user_engine_1"]
    assert [one["runtime_env"]["env_vars"]["VLLM_RAY_BUNDLE_INDICES"] for one in options] == ["3,4", "5,6"]
    assert [one["num_gpus"] for one in options] == [0, 0]


def test_shares_of_one_gpu_stand_in_the_actors_order():
    shares = {"gpus_per_engine_rank": 0.2, "gpus_per_learner_rank": 0.5}
    placed = layout(UserEngineConfig(engines=1, gpus_per_rank=0.3), engines=1, learner_ranks=1, **shares)
    assert [bundle["GPU"] for bundle in bundles(placed)] == [0.2, 0.3, 0.5]
    (options,) = _engine_options("user_engine", placed, placed.users, None, placed.policy.ranks)
    assert options["num_gpus"] == 0.3 and "runtime_env" not in options


def test_learners_on_gpus_share_out_the_cores_for_what_steps_on_the_host():
    placed = layout(UserEngineConfig(), engines=1, learner_ranks=3)
    assert placed.threads == 8 // 3
    assert _learner_options("policy_learner_0", placed, None, 2)["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "2"}}
    assert "runtime_env" not in _engine_options("rollout_engine", placed, placed.policy, None, 0)[0]
    assert layout(UserEngineConfig(), engines=1, learner_ranks=16).threads == 1
