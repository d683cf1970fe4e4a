"""Whole runs on real Ray, vLLM and DeepSpeed with a tiny model, through the command line, as a user starts
them."""

import asyncio
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from rlver_dist.dialogue import Role
from rlver_dist.evaluation.held_out import HeldOut, compare
from rlver_dist.ledger.parquet import read_dialogues
from rlver_dist.tracking.jsonl import read_metrics
from tests.integration.faulty_server import FaultyServer
from tests.integration.launched import TIMEOUT_S, Finished, Launch, launching
from tests.timing import hang_limit

ACTORS = ("rollout_engine_0", "reward_service_0", "policy_learner_0", "critic_learner_0")
FIRST = ("evaluation.num_personas=3", "num_iterations=4", "save_every=3")


def get(url: str, token: str = "") -> str:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.read().decode()


class Dashboard:
    """The Ray dashboard of a run, as its console names it."""

    def __init__(self, launch: Launch) -> None:
        self.address, self.token = launch.wait_for(r"Ray dashboard: (\S+) \(token (\w+)\)").groups()

    def actors(self) -> list[dict]:
        return json.loads(get(f"{self.address}/api/v0/actors", self.token))["data"]["result"]["result"]

    def metrics(self) -> str:
        """Every node's Prometheus page, found through the dashboard's own service discovery."""
        found = json.loads(get(f"{self.address}/api/prometheus/sd", self.token))
        return "\n".join(get(f"http://{target}/metrics") for group in found for target in group["targets"])


@pytest.fixture
def launch():
    """Starts runs, which end with the test."""
    with launching() as start:
        yield start


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    with launching() as start:
        yield watched(start(tmp_path_factory.mktemp("run") / "first", *FIRST, recipe="ppo_no_think"))


def watched(launch: Launch) -> Finished:
    """The run's end, and what its dashboard showed meanwhile."""
    dashboard = Dashboard(launch)
    launch.wait_for(r"iteration 1/4")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"{dashboard.address}/api/v0/actors")
    listed = dashboard.actors()
    seen, deadline = "", time.monotonic() + hang_limit(60)
    while (
        "ray_rlver_reward_mean" not in seen and launch.process.poll() is None and time.monotonic() < deadline
    ):
        seen = dashboard.metrics()
        time.sleep(0.5)
    finished = launch.finish()
    finished.actors = {actor["name"] for actor in listed if actor["state"] == "ALIVE"}
    finished.metrics = seen
    return finished


def test_it_ends_well(first):
    assert first.code == 0, first.output
    assert "iteration 4/4" in first.output
    assert first.left_over == []


def test_the_running_job_lists_its_actors_by_name(first):
    assert first.actors >= set(ACTORS)


def test_the_dashboards_metrics_hold_the_runs_own(first):
    assert re.search(r'^ray_rlver_reward_mean\{.*run="first".*\} [0-9.e-]+$', first.metrics, re.MULTILINE)


def test_every_result_is_there(first):
    summary = json.loads((first.folder / "summary.json").read_text())
    assert summary["num_eval_personas"] == 3
    assert {"before", "after", "difference", "interval95", "wall_s"} <= summary.keys()
    assert {"before", "after", "difference", "interval95"} <= summary["second_appraiser"].keys()
    for control in ("distinct2", "perplexity"):
        assert summary[control]["before"] > 0 and summary[control]["after"] > 0
    # A random model's perplexity is near the size of its vocabulary of 49,152.
    assert 10_000 < summary["perplexity"]["before"] < 200_000
    assert "max_turns: 2" in (first.folder / "config.yaml").read_text()
    assert list((first.folder / "wandb").glob("offline-run-*"))


def test_the_intervals_can_be_had_again_from_each_users_figures(first):
    summary = json.loads((first.folder / "summary.json").read_text())
    held_out = json.loads((first.folder / "held_out.json").read_text())
    before, after = HeldOut(**held_out["before"]), HeldOut(**held_out["after"])
    assert len(set(before.persona_ids)) == 3 and held_out["control"] is None
    again = compare(before, after, 10_000)
    for key in ("interval95", "second_appraiser", "difference"):
        assert again[key] == summary[key]


def test_metrics_have_a_line_an_iteration(first):
    lines = read_metrics(first.folder / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["rollout/dialogues"] == 4 and line["rollout/failed"] == 0
        assert line["learner/optimizer_steps"] == 1 and line["learner/grad_norm"] >= 0
        assert line["sync/probe_max_abs"] <= 1e-4
        assert line["learner/logprob_gap"] <= 1e-3
        assert line["critic/value_loss"] >= 0 and line["critic/explained_variance"] <= 1


def test_dialogues_carry_their_policy_version(first):
    for iteration in (1, 2, 3, 4):
        dialogues = read_dialogues(first.folder / "dialogues" / f"train_{iteration:06d}.parquet")
        versions = {turn.policy_version for dialogue in dialogues for turn in dialogue.turns}
        assert versions == {(iteration - 1, iteration - 1)}


def test_before_and_after_share_personas_and_seeds(first):
    before, after = (
        read_dialogues(first.folder / "dialogues" / name)
        for name in ("before_000000.parquet", "after_000004.parquet")
    )
    assert [(d.persona_id, d.seed, d.opening) for d in before] == [
        (d.persona_id, d.seed, d.opening) for d in after
    ]


def test_the_policy_folder_loads_in_transformers(first):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(first.folder / "policy")
    model = AutoModelForCausalLM.from_pretrained(first.folder / "policy")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model(**prompt).logits.shape[-1] == len(tokenizer)


def test_the_policy_folder_loads_in_plain_vllm(first):
    code = (
        "import sys; from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28)\n"
        "    out = llm.chat([{'role': 'user', 'content': 'Hello'}], SamplingParams(max_tokens=4), "
        "use_tqdm=False)\n"
        "    print('sampled', len(out[0].outputs[0].token_ids))\n"
    )
    script = first.folder / "serve.py"
    script.write_text(code)
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(first.folder / "policy")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=hang_limit(240),
        check=False,
    )
    assert "sampled 4" in done.stdout, done.stderr[-2000:]


def test_resume_goes_on_and_keeps_the_results_before(first, launch):
    before = json.loads((first.folder / "summary.json").read_text())["before"]
    again = launch(
        first.folder, "evaluation.num_personas=3", "num_iterations=5", "save_every=3", recipe="ppo_no_think"
    ).finish()
    assert again.code == 0, again.output
    assert "resumed from" in again.output and "after 4 iterations" in again.output
    assert "iteration 5/5" in again.output and "iteration 4/5" not in again.output
    assert "evaluation before" not in again.output
    assert json.loads((first.folder / "summary.json").read_text())["before"] == before
    assert [line["iteration"] for line in read_metrics(first.folder / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_resume_with_other_ranks_is_refused_in_one_line(first, launch):
    kept = sorted(path.name for path in first.folder.iterdir())
    ended = launch(
        first.folder, "cluster.learner_ranks=4", "num_iterations=9", recipe="ppo_no_think"
    ).finish()
    assert ended.code == 2, ended.output
    assert (
        "was written with policy_learner ranks=1 and this run has 2; use cluster.learner_ranks=2"
        in ended.output
    )
    assert "Traceback" not in ended.output and sorted(path.name for path in first.folder.iterdir()) == kept


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that trains adapters and gets Ctrl-C after two iterations."""
    adapters = ("model.lora.rank=4", "learner.lr=0.01")
    with launching() as start:
        running = start(
            tmp_path_factory.mktemp("run") / "long",
            *adapters,
            "evaluation.num_personas=0",
            "num_iterations=500",
            "save_every=0",
        )
        running.wait_for(r"iteration 2/500")
        os.killpg(running.process.pid, signal.SIGINT)
        yield running.finish()


def test_ctrl_c_saves_what_was_learned_says_how_to_resume_and_leaves_no_process(interrupted):
    assert interrupted.code == 130, interrupted.output
    assert f"output_dir={interrupted.folder}" in interrupted.output
    assert "Traceback" not in interrupted.output and interrupted.left_over == []
    (checkpoint,) = (interrupted.folder / "checkpoints").glob("step_*/manifest.json")
    assert json.loads(checkpoint.read_text())["iteration"] == len(
        read_metrics(interrupted.folder / "metrics.jsonl")
    )


def test_adapters_train_and_travel_merged(interrupted):
    lines = read_metrics(interrupted.folder / "metrics.jsonl")
    assert len(lines) >= 2 and all(line["learner/grad_norm"] > 0 for line in lines[:2])
    assert all(line["sync/probe_max_abs"] <= 1e-4 for line in lines)


@pytest.mark.slow
def test_a_chat_model_is_warmed_up_and_then_thinks_with_a_critic(tmp_path, launch):
    small = [
        "rollout.dialogues_per_iteration=4",
        "rollout.max_turns=2",
        "evaluation.num_personas=2",
        "evaluation.max_turns=1",
    ]
    warm_up = [
        "warm_up.dialogues=8",
        "warm_up.max_turns=2",
        "warm_up.batch_size=4",
        "warm_up.epochs=4",
        "critic.num_layers=2",
        "algorithm.kl_coef=0.01",
    ]
    ended = launch(
        tmp_path / "think", *small, *warm_up, "num_iterations=1", recipe="ppo_think", on="cpu"
    ).finish()
    assert ended.code == 0, ended.output
    summary = json.loads((tmp_path / "think" / "summary.json").read_text())
    # The base model replies without thinking, so every reply of its control is well-formed.
    assert summary["warm_up"]["well_formed"]["before"] == 1
    assert summary["warm_up"]["after"] == summary["before"]
    held_out = json.loads((tmp_path / "think" / "held_out.json").read_text())
    assert (
        compare(HeldOut(**held_out["control"]), HeldOut(**held_out["before"]), 10_000) == summary["warm_up"]
    )
    after = read_dialogues(tmp_path / "think" / "dialogues" / "after_000001.parquet")
    assert any(turn.thinking and turn.well_formed for dialogue in after for turn in dialogue.turns)
    for dialogue in read_dialogues(tmp_path / "think" / "dialogues" / "train_000001.parquet"):
        heard = [message.text for message in dialogue.messages() if message.role is Role.ASSISTANT]
        assert heard == [turn.reply for turn in dialogue.turns][: len(heard)]
    again = launch(
        tmp_path / "think", *small, *warm_up, "num_iterations=2", recipe="ppo_think", on="cpu"
    ).finish()
    assert again.code == 0 and "warm-up" not in again.output.partition("Held-out users")[0], again.output
    first, second = read_metrics(tmp_path / "think" / "metrics.jsonl")
    for line in (first, second):
        assert math.isfinite(line["critic/value_loss"]) and math.isfinite(line["learner/policy_loss"])
        # Also after a resume the reference is the warmed-up model: by the one that came the tags alone would
        # cost some nats a token.
        assert abs(line["learner/kl_ref"]) < 0.2


@pytest.mark.slow
def test_a_small_chat_model_speaks_for_the_users(tmp_path, launch):
    small = [
        "rollout.dialogues_per_iteration=8",
        "rollout.max_turns=2",
        "evaluation.num_personas=2",
        "evaluation.max_turns=1",
    ]
    running = launch(tmp_path / "llm", "simulator=vllm", *small, "num_iterations=2", on="cpu")
    dashboard = Dashboard(running)
    running.wait_for(r"iteration 1: rollout")
    listed = dashboard.actors()
    ended = running.finish()
    assert ended.code == 0, ended.output
    assert "user_engine_0" in {actor["name"] for actor in listed if actor["state"] == "ALIVE"}
    assert ended.left_over == []
    lines = read_metrics(tmp_path / "llm" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        # A model of this size breaks its schema now and then, and loses a dialogue by it; most are held.
        assert line["rollout/dialogues"] == 8 and line["rollout/failed"] <= 2
        assert (
            line["simulator/chat_calls"] >= line["simulator/requests"] - 8
            and line["simulator/chat_completion_tokens"] > 0
        )
        assert line["simulator/prefix_cache_hit"] > 0.4
        assert 0 < line["simulator/chat_latency_p50_s"] <= line["simulator/latency_p99_s"]
    for dialogue in read_dialogues(tmp_path / "llm" / "dialogues" / "train_000002.parquet"):
        emotion = dialogue.start_emotion
        for turn in dialogue.turns:
            if turn.appraisal is not None:
                assert json.loads(turn.appraisal.source)["model"] == "smollm2-135m-instruct"
                assert turn.appraisal.change in range(-10, 11)
                emotion = min(max(emotion + turn.appraisal.change, 0), 100)
                assert turn.emotion_after == emotion


def test_a_used_up_budget_ends_the_run_with_a_checkpoint_and_one_line(tmp_path, launch):
    with serving() as url:
        users = [
            "simulator=openai",
            f"simulator.openai.endpoints={url}",
            "simulator.openai.model=m",
            "simulator.openai.api_key_env=''",
        ]
        budget = ["simulator.openai.max_tokens_total=160000", "simulator.replicas=2"]
        rest = ["evaluation.num_personas=0", "num_iterations=500", "save_every=0"]
        ended = launch(tmp_path / "poor", *users, *budget, *rest).finish()
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output and ended.left_over == []
    (line,) = (line for line in ended.output.splitlines() if line.startswith("error:"))
    (checkpoint,) = (tmp_path / "poor" / "checkpoints").glob("step_*/manifest.json")
    finished = json.loads(checkpoint.read_text())["iteration"]
    assert (
        "used up" in line
        and f"step_{finished} saved; go on with: " in line
        and f"output_dir={tmp_path / 'poor'}" in line
    )
    metrics = read_metrics(tmp_path / "poor" / "metrics.jsonl")
    assert len(metrics) == finished
    # Whoever was answered before the end was charged for, and nobody after it.
    assert (
        0
        < sum(
            line["simulator/chat_prompt_tokens"] + line["simulator/chat_completion_tokens"]
            for line in metrics
        )
        <= 160000
    )


@contextlib.contextmanager
def serving():
    """The address of an endpoint that answers, on a thread of its own."""
    started, stop, urls = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with FaultyServer() as server:
            urls.append(server.url)
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.1)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(timeout=10)
        yield urls[0]
    finally:
        stop.set()
        thread.join(timeout=10)


def test_too_few_gpus_stop_before_anything_is_built(tmp_path):
    model = ("model.path=tiny-random", "model.max_context_tokens=4096")
    arguments = ["+exp=grpo_no_think", *model, f"output_dir={tmp_path / 'none'}"]
    done = subprocess.run(
        [sys.executable, "-m", "rlver_dist.launch", *arguments],
        capture_output=True,
        text=True,
        timeout=hang_limit(TIMEOUT_S),
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: this run needs at least 1 GPU and Ray sees none")
    )
    assert not (tmp_path / "none").exists()
