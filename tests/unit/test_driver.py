"""The loop in one process: real collector, users, credit, ledger and checkpoints; an engine and a learner
that only count."""

import asyncio
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rlver_dist.bundled_models import resolve
from rlver_dist.cluster.components import Components
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import AlgorithmName, KLPlacement, Precision
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.learner import CriticConfig, LearnerConfig, WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Appraisal
from rlver_dist.errors import BoundaryError, BudgetError, WeightMismatchError, WeightSyncError
from rlver_dist.evaluation.held_out import HeldOut
from rlver_dist.ledger.parquet import read_records
from rlver_dist.rollout.collector import Generation
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.llm.judges import RuleJudge
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.simulator.rules.user import EmbeddedSimulator
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.forecast import Forecast
from rlver_dist.tracking.jsonl import JsonlTracker, read_metrics
from rlver_dist.tracking.metrics import Metric, Reduction
from rlver_dist.trainer.checkpoints import CheckpointStore
from rlver_dist.trainer.driver import Driver

WORDS = (
    "So the letter came on Friday.",
    "And your brother said nothing?",
    "I see.",
    "That was four years of work.",
)


class ByLength:
    """Longer replies please more: enough to tell dialogues apart."""

    def appraise(self, context):
        change = min(len(context.messages[-1].text) / 4 - 3, context.max_change)
        return Appraisal(content="", fit="", activity="", feeling="", change=round(change, 2))


class CountingPolicy:
    """Records what it is asked to do, in order, in `journal`; every trained token is `kl` nats from the
    reference."""

    kl = 0.5

    def __init__(self, journal: list, began: set[str]) -> None:
        self.journal, self.began = journal, began
        self.advantages: list[list[torch.Tensor]] = []
        self.kl_coefs: list[float] = []

    async def update(self, samples, advantages, kl_coef):
        self.journal.append("update")
        self.advantages.append(advantages)
        self.kl_coefs.append(kl_coef)
        await asyncio.sleep(0)
        return [Metric("learner/optimizer_steps", 1, Reduction.max)]

    async def kl_tokens(self, samples):
        self.journal.append("kl_tokens")
        return [torch.full((sample.num_trained,), self.kl) for sample in samples]

    async def imitate(self, samples, config, seed):
        self.journal.append(f"imitate {len(samples)}")
        self.began.add("imitate")
        names = [f"warm_up/{loss}_{end}" for loss in ("format_nll", "reply_kl") for end in ("first", "last")]
        return [Metric(name, 2.0, Reduction.last) for name in names]

    async def score_rate(self):
        return 1000.0

    async def progress(self):
        return 1, 2

    async def base_nll(self, samples):
        return 2.0 * sum(sum(sample.loss_mask) for sample in samples), sum(
            sum(sample.loss_mask) for sample in samples
        )

    async def save(self, directory: Path):
        (directory / "weights").write_text("w")

    async def load(self, directory: Path):
        self.journal.append(f"load {directory.name}")

    async def export(self, directory: Path):
        self.journal.append(f"export {directory.name}")


class CountingCritic:
    """Expects 0.25 everywhere, and records what it is asked to do."""

    def __init__(self, journal: list) -> None:
        self.journal = journal
        self.returns: list[list[torch.Tensor]] = []

    async def values(self, samples):
        self.journal.append("values")
        return [torch.full((sample.num_trained,), 0.25) for sample in samples]

    async def update(self, samples, values, returns):
        self.journal.append("critic")
        self.returns.append(returns)
        return [Metric("critic/value_loss", 0.0, Reduction.last)]

    async def save(self, directory: Path):
        (directory / "critic").write_text("w")

    async def load(self, directory: Path):
        self.journal.append(f"load critic {directory.name}")


class Harness:
    """A driver with its components and the journal of what they did."""

    def __init__(
        self,
        folder: Path,
        renderer: Renderer,
        fail: str = "",
        plain_renderer: Renderer | None = None,
        budget: int = 10**6,
        **changes,
    ) -> None:
        """`fail`: ids that match fail from their start; `budget`: appraisals of training dialogues until
        there is no more."""
        self.journal: list = []
        self.began: set[str] = set()
        """Kinds of dialogues that replies were asked for in, and `imitate`."""
        self.asked: list[str] = []
        self.evaluated_after: dict[str, str] = {}
        """What was the newest in the journal when a first evaluation dialogue began, by what the evaluation
        is for."""
        self.version = -1
        self.appraised = 0
        self.sync_failures: dict[int, Exception] = {}
        self.service_failure: Exception | None = None
        self.cut_off_at: str | None = None
        """The run is cancelled when a dialogue whose id starts so is asked a reply for."""
        self._speaks, self._fail = plain_renderer or renderer, fail
        config = RunConfig(
            model=ModelConfig(path="tiny-random", dtype=Precision.float32, max_context_tokens=2048),
            algorithm=AlgorithmConfig(group_size=2),
            rollout=RolloutConfig(dialogues_per_iteration=4, max_turns=2, max_reply_tokens=20),
            learner=LearnerConfig(zero_stage=0),
            evaluation=EvaluationConfig(num_personas=2, max_turns=2),
            output_dir=str(folder),
            num_iterations=2,
            save_every=1,
        )
        self.config = replace(config, **changes)
        self.policy = CountingPolicy(self.journal, self.began)
        self.critic = CountingCritic(self.journal) if self.config.has_critic else None
        users = EmbeddedSimulator(rules=resolve_rules(SimulatorConfig()), appraiser=ByLength())

        async def respond(request):
            if request.turn_index == -1 and request.dialogue_id.startswith("train"):
                self.asked.append(request.persona.id)
            if request.turn_index >= 0 and request.dialogue_id.startswith("train"):
                self.appraised += 1
            if self.appraised > budget:
                raise BudgetError(f"{budget} appraisals are used up")
            return users.respond(request)

        components = Components(
            generate=self.generate,
            users=respond,
            evaluation_users=respond,
            second_judge=RuleJudge(appraiser=ByLength(), rules=resolve_rules(SimulatorConfig())),
            policy=self.policy,
            critic=self.critic,
            sync=self.sync,
            service_metrics=self.service_metrics,
            tokenizer=tokenizer(),
            renderer=renderer,
            plain_renderer=plain_renderer or renderer,
            trackers=[JsonlTracker(folder / "metrics.jsonl", first_iteration=1)],
            console=Console(2, file=(folder / "console.txt").open("w")),
            forecast=Forecast(
                rollout=self.config.rollout,
                algorithm=self.config.algorithm,
                evaluation=self.config.evaluation,
                warm_up=self.config.warm_up,
            ),
            ranks={"policy_learner": "3"},
        )
        self.driver = Driver(
            self.config, components, load_split("bank", "train"), load_split("bank", "evaluation")
        )

    async def go_on(self, checkpoint: Path) -> None:
        """Resume and run to the end."""
        await self.driver.resume(checkpoint)
        await self.driver.run()

    async def generate(self, request):
        if self.cut_off_at is not None and request.dialogue_id.startswith(self.cut_off_at):
            raise asyncio.CancelledError
        if self._fail and re.match(self._fail, request.dialogue_id):
            raise ConnectionError("engine gone")
        phase = request.dialogue_id.partition("-")[0]
        self.began.add(phase if "-t" not in request.dialogue_id else "thoughts")
        if phase in ("control", "before", "after"):
            self.evaluated_after.setdefault(phase, f"{len(self.journal)}: {self.journal[-1]}")
        ids = self._speaks.encode_reply("", WORDS[request.seed % len(WORDS)])
        return Generation(
            token_ids=ids,
            logprobs=[-1.0] * len(ids),
            finish_reason="stop",
            policy_version=(self.version, self.version),
        )

    async def sync(self, version):
        self.journal.append(f"sync {version}")
        if version in self.sync_failures:
            raise self.sync_failures.pop(version)
        self.version = version
        return []

    async def service_metrics(self):
        if self.service_failure is not None:
            raise self.service_failure
        return []


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve("tiny-random"))


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tokenizer(), "Be kind.")


def test_an_iteration_is_collect_update_sync(tmp_path, renderer):
    harness = Harness(tmp_path, renderer)
    before, after = asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "update", "sync 1", "update", "sync 2", "export policy"]
    assert before is not None and after is not None
    assert before.perplexity == pytest.approx(math.exp(2.0))
    # The engine's replies depend on seeds alone here, so nothing may differ between the two evaluations.
    assert before.emotion == after.emotion and before.persona_ids == after.persona_ids
    for iteration in (1, 2):
        records = read_records(tmp_path / "dialogues" / f"train_{iteration:06d}.parquet")
        assert {record.dialogue.turns[0].policy_version for record in records} == {
            (iteration - 1, iteration - 1)
        }
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
    assert len(harness.policy.advantages[0]) == 2 and len(harness.policy.advantages[1]) == 4
    records = {
        record.dialogue.id: record for record in read_records(tmp_path / "dialogues" / "train_000001.parquet")
    }
    failed = records["train-000000-0000-01"]
    assert (
        failed.reward is None and failed.dialogue.error is not None and "engine gone" in failed.dialogue.error
    )


def test_an_iteration_without_a_whole_group_updates_nothing(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, fail="train-000000-.*-01")
    asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "sync 1", "update", "sync 2", "export policy"]
    assert "nothing to learn from" in (tmp_path / "console.txt").read_text()


def test_a_run_ends_where_every_dialogue_fails_and_keeps_what_it_learned(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, fail="train-000001", save_every=0, num_iterations=3)
    with pytest.raises(
        BoundaryError, match=r"^iteration 2: rollout: all 4 dialogues failed, 4 of them with: .*engine gone"
    ):
        asyncio.run(harness.driver.run())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0", "step_1"]


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
    assert CheckpointStore.read(checkpoint).shape == {
        **first.config.resume_fingerprint,
        "policy_learner": "3",
    }

    asyncio.run(second.go_on(checkpoint))
    assert second.journal == ["load step_1", "sync 1", "update", "sync 2", "export policy"]
    assert sorted(first.asked + second.asked) == sorted(whole.asked)
    assert second.driver.progress.wall_s > first.driver.progress.wall_s
    assert replace(second.driver.progress, wall_s=0) == replace(whole.driver.progress, wall_s=0)


def test_kl_in_the_reward_is_asked_for_before_the_update(tmp_path, renderer):
    algorithm = AlgorithmConfig(group_size=2, kl_coef=0.1, kl_placement=KLPlacement.reward)
    harness = Harness(tmp_path, renderer, algorithm=algorithm, num_iterations=1)
    asyncio.run(harness.driver.run())
    assert harness.journal == ["sync 0", "kl_tokens", "update", "sync 1", "export policy"]


def test_without_evaluation_personas_there_is_no_evaluation(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, evaluation=EvaluationConfig(num_personas=0), num_iterations=1)
    assert asyncio.run(harness.driver.run()) == (None, None)
    assert not list((tmp_path / "dialogues").glob("before*"))


def ppo(**changes):
    return AlgorithmConfig(name=AlgorithmName.ppo, group_size=1, **changes)


def test_ppo_asks_the_critic_first_and_updates_both(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, algorithm=ppo(whiten_advantages=False), num_iterations=1)
    asyncio.run(harness.driver.run())
    # The updates run at the same time (test_training_step.py), so either may be the first.
    assert harness.journal[:2] == ["sync 0", "values"] and sorted(harness.journal[2:4]) == [
        "critic",
        "update",
    ]
    records = read_records(tmp_path / "dialogues" / "train_000001.parquet")
    assert len({record.dialogue.persona_id for record in records}) == 4
    for record, advantages, returns in zip(
        records, harness.policy.advantages[0], harness.critic.returns[0], strict=True
    ):
        # gamma = lambda = 1: every token is paid the reward, over what the critic expected.
        assert torch.allclose(advantages, torch.full_like(advantages, record.reward - 0.25), atol=1e-6)
        assert torch.allclose(returns, torch.full_like(returns, record.reward), atol=1e-6)
        assert record.advantage == pytest.approx(record.reward - 0.25, abs=1e-6)
    assert (tmp_path / "checkpoints" / "step_1" / "critic").exists()


def test_the_critic_can_learn_alone_first(tmp_path, renderer):
    harness = Harness(
        tmp_path, renderer, algorithm=ppo(), critic=CriticConfig(zero_stage=0, pretrain_iterations=1)
    )
    asyncio.run(harness.driver.run())
    assert harness.journal.count("critic") == 2 and harness.journal.count("update") == 1


@pytest.mark.parametrize(("target", "change"), [(0.1, 1.2), (5.0, 0.8)])
def test_an_adapted_kl_weight_follows_the_measured_kl_and_is_saved(tmp_path, renderer, target, change):
    algorithm = ppo(kl_coef=0.1, kl_placement=KLPlacement.reward, kl_target=target, kl_horizon=4.0)
    harness = Harness(tmp_path, renderer, algorithm=algorithm)
    asyncio.run(harness.driver.run())
    assert harness.policy.kl_coefs == pytest.approx([0.1, 0.1 * change])
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None
    assert CheckpointStore.read(checkpoint).kl_coef == pytest.approx(0.1 * change**2)


def test_an_interrupted_update_is_finished_and_saved(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=0, num_iterations=50)

    async def interrupted():
        running = asyncio.ensure_future(harness.driver.run())
        while harness.journal.count("update") < 2:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    assert harness.journal[-2:] == ["update", "sync 2"]
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None and CheckpointStore.read(checkpoint).iteration == 2


def test_a_used_up_budget_saves_what_was_learned(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=0, num_iterations=50, budget=18)
    with pytest.raises(BudgetError, match="used up"):
        asyncio.run(harness.driver.run())
    done = harness.journal.count("update")
    assert 0 < done < 50
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None and CheckpointStore.read(checkpoint).iteration == done
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == done


@pytest.fixture(scope="module")
def thinking():
    return Renderer(tokenizer(), "Be kind. Think first.", think=True)


WARMED_UP = {
    "rollout": RolloutConfig(dialogues_per_iteration=4, max_turns=2, max_reply_tokens=40, think=True),
    "warm_up": WarmUpConfig(dialogues=2, max_turns=1, batch_size=1),
    "num_iterations": 1,
}


def latest(folder: Path) -> Path:
    checkpoint = CheckpointStore(folder, 2).latest()
    assert checkpoint is not None
    return checkpoint


def test_the_first_evaluation_begins_after_the_warm_up_also_where_it_was_cut_off_between(
    tmp_path, thinking, renderer
):
    harness = Harness(tmp_path, thinking, plain_renderer=renderer, fail="before", **WARMED_UP)
    with pytest.raises(BoundaryError, match=r"^evaluation before: all 2 dialogues failed"):
        asyncio.run(harness.driver.run())
    again = Harness(tmp_path, thinking, plain_renderer=renderer, **WARMED_UP)
    asyncio.run(again.go_on(latest(tmp_path)))
    # A learner that starts from the warmed-up policy's folder has nothing to load.
    assert again.journal == ["sync 0", "update", "sync 1", "export policy"]
    assert again.evaluated_after == {"before": "1: sync 0", "after": "3: sync 1"}
    assert again.driver.progress.control and again.driver.progress.before


def test_a_first_evaluation_of_another_policy_than_the_warmed_up_one_is_made_anew(
    tmp_path, thinking, renderer
):
    unwarmed = Harness(tmp_path, thinking, plain_renderer=renderer, **WARMED_UP)
    other = HeldOut(
        persona_ids=[], emotion=[], second_emotion=[], distinct2=0, perplexity=1, well_formed=0, failed=0
    )
    unwarmed.driver.progress.before = other
    asyncio.run(unwarmed.driver.run())
    assert unwarmed.evaluated_after["before"] == "4: sync 0" and unwarmed.driver.progress.before != other


def test_what_was_learned_without_an_evaluation_is_not_the_beginning_of_a_comparison(tmp_path, renderer):
    first = Harness(tmp_path, renderer, evaluation=EvaluationConfig(num_personas=0), num_iterations=1)
    asyncio.run(first.driver.run())
    second = Harness(tmp_path, renderer)
    asyncio.run(second.driver.resume(latest(tmp_path)))
    before, after = asyncio.run(second.driver.run())
    assert before is None and after is not None and "before" not in second.evaluated_after
    assert "began without an evaluation" in (tmp_path / "console.txt").read_text()


def test_the_warm_up_comes_before_the_first_evaluation_and_only_once(tmp_path, thinking, renderer):
    changes = WARMED_UP
    harness = Harness(tmp_path, thinking, plain_renderer=renderer, **changes)
    asyncio.run(harness.driver.run())
    assert harness.journal[:4] == ["sync 0", "imitate 2", "export warm_start", "sync 0"]
    assert harness.evaluated_after == {"control": "1: sync 0", "before": "4: sync 0", "after": "6: sync 1"}
    control = harness.driver.progress.control
    assert control is not None and control.well_formed == 1.0
    assert (tmp_path / "dialogues" / "control_000000.parquet").exists()
    again = Harness(tmp_path, thinking, plain_renderer=renderer, **{**changes, "num_iterations": 2})
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None

    asyncio.run(again.go_on(checkpoint))
    assert not any(entry.startswith("imitate") for entry in again.journal)
    assert again.driver.progress.control == control


def test_a_second_interrupt_leaves_the_update_alone_and_saves_nothing(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=0, num_iterations=50)
    update = harness.policy.update

    async def slow_update(samples, advantages, kl_coef):
        metrics = await update(samples, advantages, kl_coef)
        if harness.journal.count("update") == 2:
            await asyncio.sleep(60)
        return metrics

    harness.policy.update = slow_update

    async def interrupted():
        running = asyncio.ensure_future(harness.driver.run())
        while harness.journal.count("update") < 2:
            await asyncio.sleep(0)
        for _ in range(2):
            running.cancel()
            await asyncio.sleep(0.05)
        assert running.done()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(interrupted())
    assert latest(tmp_path).name == "step_0"


def test_a_fixed_kl_weight_follows_the_configuration_at_a_resume(tmp_path, renderer):
    first = Harness(tmp_path, renderer, algorithm=ppo(kl_coef=0.1), num_iterations=1)
    asyncio.run(first.driver.run())
    second = Harness(tmp_path, renderer, algorithm=ppo(kl_coef=0.3))
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None

    asyncio.run(second.go_on(checkpoint))
    assert second.policy.kl_coefs == [0.3]


def test_an_adapted_kl_weight_starts_anew_where_it_was_0(tmp_path, renderer):
    first = Harness(tmp_path, renderer, algorithm=ppo(), num_iterations=1)
    asyncio.run(first.driver.run())
    second = Harness(tmp_path, renderer, algorithm=ppo(kl_coef=0.3, kl_target=0.1))
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None

    asyncio.run(second.go_on(checkpoint))
    assert second.policy.kl_coefs == [0.3]


@pytest.mark.parametrize(
    "failure",
    [
        WeightMismatchError("engine 1 differs"),
        WeightSyncError("engine 1: cannot read"),
        ConnectionError("engine 1 is gone"),
    ],
)
def test_a_failed_sync_ends_the_run_with_everything_that_the_learners_have_learned(
    tmp_path, renderer, failure
):
    """Weights that engines and learner do not agree on are kept, and gone on from only where that is said."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = Harness(tmp_path / "whole", renderer, save_every=0, num_iterations=3)
    asyncio.run(whole.driver.run())
    first = Harness(tmp_path / "cut", renderer, save_every=0, num_iterations=3)
    first.sync_failures[2] = failure
    with pytest.raises(type(failure), match="engine 1"):
        asyncio.run(first.driver.run())
    assert first.journal == ["sync 0", "update", "sync 1", "update", "sync 2"]
    lines = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2] and all("time/sync_s" in line for line in lines)
    disagree = isinstance(failure, WeightMismatchError)
    checkpoint = tmp_path / "cut" / "checkpoints" / ("failed_step_2" if disagree else "step_2")
    assert latest(tmp_path / "cut").name == ("step_0" if disagree else "step_2")
    second = Harness(tmp_path / "cut", renderer, save_every=0, num_iterations=3)
    asyncio.run(second.go_on(checkpoint))
    assert second.journal == [f"load {checkpoint.name}", "sync 2", "update", "sync 3", "export policy"]
    assert sorted(first.asked + second.asked) == sorted(whole.asked)
    assert replace(second.driver.progress, wall_s=0) == replace(whole.driver.progress, wall_s=0)


def test_services_that_cannot_be_asked_after_a_sync_lose_nothing_that_was_learned(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=0)
    harness.service_failure = ConnectionError("engine 1 is gone")
    with pytest.raises(ConnectionError, match="engine 1"):
        asyncio.run(harness.driver.run())
    checkpoint = CheckpointStore(tmp_path, 2).latest()
    assert checkpoint is not None and CheckpointStore.read(checkpoint).iteration == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_sync_that_fails_after_an_interrupt_is_saved_too(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=0, num_iterations=50)
    harness.sync_failures[2] = WeightMismatchError("engine 1 differs")

    async def interrupted():
        running = asyncio.ensure_future(harness.driver.run())
        while harness.journal.count("update") < 2:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(WeightMismatchError):
            await running

    asyncio.run(interrupted())
    kept = tmp_path / "checkpoints" / "failed_step_2"
    assert CheckpointStore.read(kept).iteration == 2 and latest(tmp_path).name == "step_0"


def test_a_failed_sync_drops_no_good_checkpoint(tmp_path, renderer):
    harness = Harness(tmp_path, renderer, save_every=1, num_iterations=3, keep_checkpoints=1)
    harness.sync_failures[2] = WeightMismatchError("engine 1 differs")
    with pytest.raises(WeightMismatchError):
        asyncio.run(harness.driver.run())
    assert latest(tmp_path).name == "step_1"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_1", "failed_step_2"}


@pytest.mark.parametrize("what", ["update", "save"])
def test_nothing_is_saved_after_a_failure_in_the_midst_of_an_update_or_a_save(tmp_path, renderer, what):
    harness = Harness(tmp_path, renderer, save_every=2, num_iterations=50)
    tried = []

    async def fails(*arguments):
        tried.append(what)
        # The first update succeeds, so that there is something learned and not saved.
        if what == "update" and len(tried) == 1:
            return [Metric("learner/optimizer_steps", 1, Reduction.max)]
        raise RuntimeError(f"{what} failed")

    setattr(harness.policy, what, fails)
    with pytest.raises(RuntimeError, match=f"{what} failed"):
        asyncio.run(harness.driver.run())
    assert len(tried) == (2 if what == "update" else 1)
    assert latest(tmp_path).name == "step_0"


def test_going_on_from_an_older_checkpoint_drops_the_dialogues_of_the_line_that_is_left(tmp_path, renderer):
    first = Harness(tmp_path, renderer, num_iterations=3, keep_checkpoints=3)
    asyncio.run(first.driver.run())
    folder = tmp_path / "dialogues"
    assert (folder / "after_000003.parquet").exists()
    old = {
        name: (folder / name).stat().st_mtime_ns for name in ("before_000000.parquet", "train_000001.parquet")
    }
    second = Harness(tmp_path, renderer, num_iterations=2, keep_checkpoints=3)
    asyncio.run(second.go_on(tmp_path / "checkpoints" / "step_1"))
    assert {path.name for path in folder.iterdir()} == old.keys() | {
        "train_000002.parquet",
        "after_000002.parquet",
    }
    assert {name: (folder / name).stat().st_mtime_ns for name in old} == old
    # A finished run that is made longer keeps what it ended with before.
    third = Harness(tmp_path, renderer, num_iterations=3, keep_checkpoints=3)
    asyncio.run(third.go_on(tmp_path / "checkpoints" / "step_2"))
    assert {path.name for path in folder.glob("after*")} == {"after_000002.parquet", "after_000003.parquet"}


@pytest.mark.parametrize("stage", ["control", "controls", "replies", "imitation", "before"])
def test_what_is_done_before_training_is_not_done_again_after_an_interrupt(
    tmp_path, thinking, renderer, stage
):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = Harness(tmp_path / "whole", thinking, plain_renderer=renderer, **WARMED_UP)
    asyncio.run(whole.driver.run())
    first = Harness(tmp_path / "cut", thinking, plain_renderer=renderer, **WARMED_UP)
    cut_off(first, stage)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(first.driver.run())
    second = Harness(tmp_path / "cut", thinking, plain_renderer=renderer, **WARMED_UP)
    newest = CheckpointStore(tmp_path / "cut", 2).latest()
    kept = set() if newest is None else set(CheckpointStore.read(newest).finished_phases)
    # Control and replies are sampled at once, so either may have ended when the other is cut off.
    surely = {"control": set(), "controls": {"control"}, "replies": set()}.get(stage, {"control", "warm_up"})
    assert surely <= kept and {"control": "control", "replies": "warm_up"}.get(stage) not in kept
    asyncio.run(second.driver.run() if newest is None else second.go_on(newest))
    # Each stage that had ended is missing from the second start, and no other.
    if stage == "before":
        kept.add("imitate")
    assert (
        second.began & {"control", "warm_up", "before", "imitate"}
        == {"control", "warm_up", "before", "imitate"} - kept
    )
    for name in ("control", "warm_up", "before"):
        ledgers = [
            read_records(folder / "dialogues" / f"{name}_000000.parquet")
            for folder in (tmp_path / "whole", tmp_path / "cut")
        ]
        assert ledgers[0] == ledgers[1]
    assert replace(second.driver.progress, wall_s=0) == replace(whole.driver.progress, wall_s=0)


def cut_off(harness: Harness, stage: str) -> None:
    """Have the run cancelled in the midst of a stage before training, or when training begins."""

    async def cancelled(*arguments, **named):
        raise asyncio.CancelledError

    if stage == "controls":
        harness.policy.base_nll = cancelled
    elif stage == "imitation":
        harness.policy.imitate = cancelled
    else:
        harness.cut_off_at = {"replies": "warm_up", "training": "train"}.get(stage, stage)


@pytest.mark.parametrize(
    "change", ["fewer replies", "shorter replies", "fewer users", "a failed dialogue", "no ledger"]
)
def test_dialogues_are_held_anew_where_others_are_asked_for_or_one_had_failed(
    tmp_path, thinking, renderer, change
):
    failing = {"fail": "warm_up-0001$"} if change == "a failed dialogue" else {}
    first = Harness(tmp_path, thinking, plain_renderer=renderer, **WARMED_UP, **failing)
    cut_off(first, "imitation")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(first.driver.run())
    changes = {
        "fewer replies": {"warm_up": WarmUpConfig(dialogues=1, max_turns=1, batch_size=1)},
        "shorter replies": {"rollout": replace(WARMED_UP["rollout"], max_reply_tokens=39)},
        "fewer users": {"evaluation": EvaluationConfig(num_personas=1, max_turns=2)},
    }.get(change, {})
    if change == "no ledger":
        (tmp_path / "dialogues" / "warm_up_000000.parquet").unlink()
    second = Harness(tmp_path, thinking, plain_renderer=renderer, **{**WARMED_UP, **changes})
    asyncio.run(second.go_on(latest(tmp_path)))
    # The control's results are there, and are not measured again.
    assert ("warm_up" in second.began) == (change != "fewer users") and "control" not in second.began
    assert (
        len(read_records(tmp_path / "dialogues" / "warm_up_000000.parquet"))
        == second.config.warm_up.dialogues
    )


def test_a_first_evaluation_is_not_read_from_the_ledger_after_a_warm_up_that_came_later(
    tmp_path, thinking, renderer
):
    first = Harness(
        tmp_path, thinking, plain_renderer=renderer, **{**WARMED_UP, "warm_up": WarmUpConfig(dialogues=0)}
    )
    cut_off(first, "training")
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(first.driver.run())
    assert "before" in CheckpointStore.read(latest(tmp_path)).finished_phases
    second = Harness(tmp_path, thinking, plain_renderer=renderer, **WARMED_UP)
    asyncio.run(second.go_on(latest(tmp_path)))
    assert "before" in second.began and second.evaluated_after["before"].endswith("sync 0")
