"""The loop in one process: real collector, users, credit, ledger and checkpoints; an engine and a learner that only count."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlver_dist.checkpoints import CheckpointStore
from rlver_dist.choices import KLPlacement, Precision
from rlver_dist.config import (
    AlgorithmConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SimulatorConfig,
)
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Appraisal
from rlver_dist.driver import Driver, Parts
from rlver_dist.ledger.parquet import read_records
from rlver_dist.models import resolve
from rlver_dist.rollout.collector import Generation
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.embedded import EmbeddedSimulator
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.jsonl import JsonlTracker, read_metrics
from rlver_dist.tracking.metrics import Metric, Reduction

WORDS = ("So the letter came on Friday.", "And your brother said nothing?", "I see.", "That was four years of work.")


class ByLength:
    """Longer replies please more: enough to tell dialogues apart."""

    def appraise(self, context):
        change = min(len(context.messages[-1].text) / 4 - 3, context.max_change)
        return Appraisal(content="", fit="", activity="", feeling="", change=round(change, 2))


class CountingLearner:
    """Records what it is asked to do, in order, in `journal`."""

    def __init__(self, journal: list) -> None:
        self.journal = journal
        self.advantages: list[list[float]] = []

    async def update(self, samples, advantages):
        self.journal.append("update")
        self.advantages.append(advantages)
        return [Metric("learner/optimizer_steps", 1, Reduction.max)]

    async def kl_sums(self, samples):
        self.journal.append("kl_sums")
        return [float(index) for index in range(len(samples))]

    async def base_nll(self, samples):
        return 2.0 * sum(sum(sample.loss_mask) for sample in samples), sum(sum(sample.loss_mask) for sample in samples)

    async def save(self, directory: Path):
        (directory / "weights").write_text("w")

    async def load(self, directory: Path):
        self.journal.append(f"load {directory.name}")

    async def export(self, directory: Path):
        self.journal.append("export")


class Harness:
    """A driver with its parts and the journal of what they did."""

    def __init__(self, folder: Path, renderer: Renderer, fail: str = "", **changes) -> None:
        self.journal: list = []
        self.asked: list[str] = []
        self.version = -1
        self._renderer, self._fail = renderer, fail
        config = RunConfig(
            model=ModelConfig(path="tiny-random", dtype=Precision.float32, max_context_tokens=2048),
            algorithm=AlgorithmConfig(group_size=2),
            rollout=RolloutConfig(batch_size=2, max_turns=2, max_reply_tokens=20),
            learner=LearnerConfig(zero_stage=0),
            evaluation=EvaluationConfig(num_personas=2, max_turns=2),
            output_dir=str(folder),
            num_iterations=2,
            save_every=1,
        )
        self.config = replace(config, **changes)
        self.learner = CountingLearner(self.journal)
        users = EmbeddedSimulator(rules=resolve_rules(SimulatorConfig()), appraiser=ByLength())

        async def respond(request):
            if request.turn_index == -1 and request.dialogue_id.startswith("train"):
                self.asked.append(request.persona.id)
            return users.respond(request)

        parts = Parts(
            generate=self.generate,
            users=respond,
            evaluation_users=respond,
            second_appraiser=ByLength(),
            evaluation_rules=resolve_rules(SimulatorConfig()).emotion,
            learner=self.learner,
            sync=self.sync,
            service_metrics=self.service_metrics,
            renderer=renderer,
            trackers=[JsonlTracker(folder / "metrics.jsonl", first_iteration=1)],
            console=Console(2, file=(folder / "console.txt").open("w")),
        )
        self.driver = Driver(self.config, parts, load_split("bank", "train"), load_split("bank", "evaluation"))

    async def generate(self, request):
        if self._fail and request.dialogue_id.startswith(self._fail):
            raise ConnectionError("engine gone")
        ids = [*self._renderer._encode_text(WORDS[request.seed % len(WORDS)]), self._renderer.end_token_id]
        return Generation(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop", policy_version=(self.version, self.version))

    async def sync(self, version):
        self.journal.append(f"sync {version}")
        self.version = version
        return []

    async def service_metrics(self):
        return []


@pytest.fixture(scope="module")
def renderer():
    return Renderer(AutoTokenizer.from_pretrained(resolve("tiny-random")), "Be kind.")


def test_an_iteration_is_collect_update_sync(tmp_path, renderer):
    harness = Harness(tmp_path, renderer)
    before, after = asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "update", "sync 1", "update", "sync 2", "export"]
    assert before is not None and after is not None
    assert before.perplexity == pytest.approx(math.exp(2.0))
    # The engine's replies depend on seeds alone here, so nothing may differ between the two evaluations.
    assert before.emotion == after.emotion and before.persona_ids == after.persona_ids
    for iteration in (1, 2):
        records = read_records(tmp_path / "dialogues" / f"train_{iteration:06d}.parquet")
        assert {record.dialogue.turns[0].policy_version for record in records} == {(iteration - 1, iteration - 1)}
        assert all(record.reward == record.dialogue.final_emotion / 100 for record in records)
        assert all(record.advantage is not None for record in records)


def test_advantages_of_a_group_sum_to_zero(tmp_path, renderer):
    harness = Harness(tmp_path, renderer)
    asyncio.run(harness.driver.run())
    for record_set in (read_records(tmp_path / "dialogues" / f"train_00000{n}.parquet") for n in (1, 2)):
        groups = {}
        for record in record_set:
            groups.setdefault(record.dialogue.group_id, []).append(record.advantage)
        assert all(sum(group) == pytest.approx(0, abs=1e-5) and len(group) == 2 for group in groups.values())


def test_a_failed_dialogue_takes_its_group_along_and_is_counted(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, fail="train-000000-0000-01")
    asyncio.run(harness.driver.run())
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["rollout/failed"], first["rollout/dropped_groups"]) == (1, 1)
    assert (second["rollout/failed"], second["rollout/dropped_groups"]) == (0, 0)
    assert len(harness.learner.advantages[0]) == 2 and len(harness.learner.advantages[1]) == 4
    records = {record.dialogue.id: record for record in read_records(tmp_path / "dialogues" / "train_000001.parquet")}
    failed = records["train-000000-0000-01"]
    assert failed.reward is None and failed.dialogue.error is not None and "engine gone" in failed.dialogue.error


def test_an_iteration_without_a_whole_group_updates_nothing(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, fail="train-000000")
    asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "sync 1", "update", "sync 2", "export"]
    assert "nothing to learn from" in (tmp_path / "console.txt").read_text()


def test_resume_meets_the_same_users_as_an_uninterrupted_run(tmp_path, renderer):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = Harness(tmp_path / "whole", renderer)
    asyncio.run(whole.driver.run())
    first = Harness(tmp_path / "cut", renderer, num_iterations=1)
    asyncio.run(first.driver.run())
    second = Harness(tmp_path / "cut", renderer)
    checkpoint = CheckpointStore(tmp_path / "cut", 2).latest()
    assert checkpoint is not None

    async def go_on():
        await second.driver.resume(checkpoint)
        return await second.driver.run()

    asyncio.run(go_on())
    assert second.journal == ["load step_1", "sync 1", "update", "sync 2", "export"]
    assert sorted(first.asked + second.asked) == sorted(whole.asked)
    assert second.driver.progress == whole.driver.progress


def test_kl_in_the_reward_is_asked_for_before_the_update(tmp_path, renderer):
    algorithm = AlgorithmConfig(group_size=2, kl_coef=0.1, kl_placement=KLPlacement.reward)
    harness = Harness(tmp_path, renderer, algorithm=algorithm, num_iterations=1)
    asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "kl_sums", "update", "sync 1", "export"]


def test_without_evaluation_personas_there_is_no_evaluation(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, evaluation=EvaluationConfig(num_personas=0), num_iterations=1)
    assert asyncio.run(harness.driver.run()) == (None, None)
    assert not list((tmp_path / "dialogues").glob("before*"))
