"""Where the file lies that carries weights from the learner to the engines."""

from types import SimpleNamespace

import pytest
import torch

from rlver_dist.cluster import weight_sync
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import Device
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.errors import ResourceError
from rlver_dist.learner.policy import PolicyLearner
from rlver_dist.learner.policy_models import PolicySettings
from rlver_dist.learner.rank import RankPlace

GIB = 2**30


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """Stand-ins for shared memory and the temporary folder, and the bytes that are free in each."""
    free = {}
    for name in ("shared", "temporary"):
        (tmp_path / name).mkdir()
        free[tmp_path / name] = 0
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", tmp_path / "shared")
    monkeypatch.setattr(weight_sync.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(weight_sync.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    return free


@pytest.mark.parametrize(
    ("shared", "temporary", "chosen"),
    [
        (4 * GIB, 9 * GIB, "shared"),
        (4 * GIB - 1, 9 * GIB, "temporary"),
        (0, 3 * GIB, "temporary"),
        (4 * GIB, 0, "shared"),
    ],
)
def test_weights_lie_in_shared_memory_where_they_leave_some_to_others(rooms, shared, temporary, chosen):
    rooms.update(zip(rooms, (shared, temporary), strict=True))
    assert weight_sync.find_weight_dir(3 * GIB).name == chosen


def test_weights_without_room_are_refused_with_what_is_free(rooms):
    rooms.update(zip(rooms, (3 * GIB, 2 * GIB), strict=True))
    with pytest.raises(ResourceError) as caught:
        weight_sync.find_weight_dir(15 * GIB)
    said = str(caught.value)
    assert (
        "a file of 15.0 GiB" in said
        and "3.0 GiB free in" in said
        and "2.0 GiB free in" in said
        and "TMPDIR" in said
    )
    assert "\n" not in said


@pytest.fixture
def learner():
    """One that has not been started."""
    settings = PolicySettings(
        model=ModelConfig(),
        algorithm=AlgorithmConfig(),
        learner=LearnerConfig(),
        temperature=1.0,
        seed=0,
    )
    return PolicyLearner(settings, RankPlace(rank=0, world_size=1, device=Device.cpu, num_threads=1))


def test_weights_are_measured_by_their_shapes(learner, monkeypatch):
    shapes = [("a", torch.bfloat16, (3, 5)), ("b", torch.float32, (7,))]
    monkeypatch.setattr(learner, "metadata", lambda: shapes)
    assert learner.weight_bytes() == 2 * 15 + 4 * 7


def test_a_learner_that_has_not_started_reports_no_progress_and_closes(learner):
    assert learner.progress() == (0, 0)
    learner.close()
    with pytest.raises(RuntimeError, match="PolicyLearner is used before start"):
        learner.save("there")
