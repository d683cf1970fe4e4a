"""What a user reads where Ray does not start."""

import pytest
import ray

from rlver_dist.cluster.session import open_session
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.errors import ResourceError

TIMED_OUT = (
    "The current node timed out during startup. This\n  could happen because some of the raylet failed to "
    "startup " + "or so " * 200
)


@pytest.fixture
def broken(monkeypatch):
    """Ray as it is where the machine is too busy for it, or nobody answers."""

    def init(**options):
        raise Exception(TIMED_OUT)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)


def test_ray_that_does_not_start_is_one_line_with_the_way_out(broken):
    with pytest.raises(
        ResourceError, match=r"^Ray did not start \(load [\d.]+ on \d+ cores\): The current node timed out"
    ) as caught:
        open_session(ClusterConfig())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert "end what else runs on this machine and start again" in str(caught.value)


def test_a_cluster_that_cannot_be_joined_is_named(broken):
    with pytest.raises(
        ResourceError,
        match=r"^cluster.address=10.0.0.7:6379: no Ray cluster can be joined there \(The current node",
    ):
        open_session(ClusterConfig(address="10.0.0.7:6379"))
