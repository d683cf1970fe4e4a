"""What a run has learned survives kills, signals, a second start and weights that go wrong."""

import signal

import pytest

from rlver_dist.trainer.checkpoints import CheckpointStore
from tests.integration.launched import launching

pytestmark = pytest.mark.slow
SHORT = ("evaluation.num_personas=0", "save_every=1")


@pytest.fixture
def launch():
    """Starts runs, which end with the test."""
    with launching() as start:
        yield start


def newest(folder) -> str:
    checkpoint = CheckpointStore(folder, 1).latest()
    assert checkpoint is not None
    return checkpoint.name


def test_weights_that_go_wrong_replace_no_good_checkpoint(tmp_path, launch):
    folder = tmp_path / "run"
    kept = (*SHORT, "keep_checkpoints=1")
    assert launch(folder, *kept, "num_iterations=1").finish().code == 0
    diverged = launch(folder, *kept, "num_iterations=3", "learner.lr=1e30").finish()
    assert diverged.code == 1 and "Traceback" not in diverged.output, diverged.output
    assert newest(folder) == "step_1"
    again = launch(folder, *kept, "num_iterations=2").finish()
    assert again.code == 0 and newest(folder) == "step_2", again.output


def test_a_killed_run_leaves_nothing_and_a_running_one_keeps_its_folder(tmp_path, launch):
    folder = tmp_path / "run"
    first = launch(folder, *SHORT, "num_iterations=50")
    first.wait_for(r"iteration 1/50")
    second = launch(folder, *SHORT, "num_iterations=50").finish()
    assert second.code == 2
    assert f"output_dir={folder}: a run runs there (pid {first.process.pid} on " in second.output
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    third = launch(folder, *SHORT, "num_iterations=2").finish()
    assert third.code == 0, third.output
    assert f"removed what the dead run of pid {first.process.pid} had left: " in third.output
    assert "resumed from" in third.output and third.left_over == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_a_preemption_save_and_say_how_to_go_on(tmp_path, launch, number):
    run = launch(tmp_path / "run", *SHORT, "num_iterations=50")
    run.wait_for(r"iteration 1/50")
    run.process.send_signal(number)
    done = run.finish()
    last = done.output.strip().splitlines()[-1]
    assert done.code == 130 and "saved; go on with: " in last, done.output
    assert newest(tmp_path / "run") in last
