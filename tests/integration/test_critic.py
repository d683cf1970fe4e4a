"""The critic's DeepSpeed learner against a plain PyTorch loop, over ranks, ZeRO stages, offload and ways of
cutting a batch."""

import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import CriticTrunk, Precision
from rlver_dist.config.learner import CriticConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.errors import ConfigError, RlverError
from rlver_dist.learner.value_model import ValueHead, load_backbone
from rlver_dist.tracking.metrics import reduce_metrics
from tests.integration.learners import (
    CUTS,
    SHAPE,
    VOCABULARY,
    critic_builder,
    draw_columns,
    grad_norms,
    movement,
    relative_error,
    resume_job,
    save_model,
    turn_sample,
)
from tests.integration.ranks import BFLOAT16, SETTINGS, SHARDED, run_jobs

CRITIC = dict(lr=0.003, warmup_steps=3, weight_decay=0.1, micro_batch_tokens=4096, zero_stage=1)
CONFIG = RunConfig(
    model=ModelConfig(dtype=Precision.float32),
    algorithm=AlgorithmConfig(name="ppo", group_size=1, updates_per_iteration=2),
    rollout=RolloutConfig(dialogues_per_iteration=6),
    critic=CriticConfig(**CRITIC, grad_clip=0.3, value_clip=0.02, epochs=2),
)
FROZEN = dict(trunk=CriticTrunk.frozen, num_layers=1, head_units=8)
ITERATIONS = 2
NUM_STEPS = CONFIG.algorithm.updates_per_iteration * CONFIG.critic.epochs
DIVERGING = {f"stage{stage}": dict(zero_stage=stage) for stage in range(4)} | {
    "bfloat16": dict(dtype=Precision.bfloat16)
}
"""Each has its own way of leaving a step out."""


def make_model(folder):
    save_model(folder / "model")


def make_samples():
    """Six dialogues of one to three turns, each turn a sample over a growing history, and a return for each
    trained token."""
    draw = random.Random(0)
    samples = []
    for dialogue in range(6):
        history = draw.choices(range(VOCABULARY), k=draw.randrange(5, 30))
        for turn in range(1 + dialogue % 3):
            reply = draw.choices(range(VOCABULARY), k=draw.randrange(4, 16))
            samples.append(
                turn_sample(
                    [*history, *reply],
                    [False] * len(history) + [True] * len(reply),
                    [-6.0] * len(reply),
                    dialogue=dialogue,
                    group=dialogue,
                    turn=turn,
                )
            )
            # Half of what was said is left out, as thinking is.
            history = [
                *history,
                *reply[len(reply) // 2 :],
                *draw.choices(range(VOCABULARY), k=draw.randrange(1, 10)),
            ]
    return samples, draw_columns(draw, samples, -0.5, 1.5)


def configure(folder, dtype=Precision.float32, **changes):
    model = ModelConfig(path=f"{folder}/model", dtype=dtype)
    return dataclasses.replace(CONFIG, model=model, critic=dataclasses.replace(CONFIG.critic, **changes))


def weights_of(learner):
    """Whole tensors by name; a critic shows them to nobody, so they are read where it keeps them."""
    parameters = dict(learner._engine._engine.module.named_parameters())
    with learner._engine.gathered(parameters.values()):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def iterate(learner):
    samples, returns = make_samples()
    values = learner.values(samples)
    return learner.update(samples, values, returns), values


def train(build, config):
    learner = build(config)
    metrics, values = zip(*(iterate(learner) for _ in range(ITERATIONS)), strict=True)
    return {"metrics": metrics, "values": values, "weights": weights_of(learner)}


def learn_one_sample(build, config):
    """What one sample, which is work for one rank, makes of the weights."""
    learner, (samples, returns) = build(config), make_samples()
    metrics = learner.update(samples[:1], learner.values(samples[:1]), returns[:1])
    return {"metrics": metrics, "weights": weights_of(learner)}


def learn(learner):
    """One iteration."""
    metrics, values = iterate(learner)
    return {"metrics": metrics, "values": values, "weights": weights_of(learner)}


def diverge(build, config):
    """The error of an update towards returns that are no numbers, and what it and one more that leaves all of
    its steps out make of weights that have learned once."""
    learner = build(config)
    samples, returns = make_samples()
    iterate(learner)
    start = weights_of(learner)
    nowhere = [column * math.nan for column in returns]
    metrics = learner.update(samples, learner.values(samples), nowhere)
    with pytest.raises(RlverError) as error:
        learner.update(samples, learner.values(samples), nowhere)
    return {"start": start, "weights": weights_of(learner), "metrics": metrics, "error": str(error.value)}


def one_rank(_, port, folder):
    build = critic_builder(0, 1, port)
    jobs = {name: (configure(folder, **changes), train) for name, changes in (CUTS | BFLOAT16).items()}
    jobs["one_sample"] = (configure(folder), learn_one_sample)
    jobs["frozen"] = (configure(folder, **FROZEN), train)
    jobs["resume"] = resume_job(
        configure(folder, zero_stage=2, offload_optimizer=True), f"{folder}/checkpoint", learn
    )
    jobs["resume_frozen"] = resume_job(configure(folder, zero_stage=0, **FROZEN), f"{folder}/frozen", learn)
    jobs["resume_bfloat16"] = resume_job(configure(folder, Precision.bfloat16), f"{folder}/bfloat16", learn)
    jobs |= {
        f"diverged_{name}": (configure(folder, max_skipped_steps=NUM_STEPS, **changes), diverge)
        for name, changes in DIVERGING.items()
    }
    results = {}
    nothing = build(configure(folder))
    results["nothing"] = (nothing.values([]), nothing.update([], [], []))
    results |= run_jobs(build, jobs, "critic")
    nothing.close()
    torch.save(results, f"{folder}/one_rank.pt")


def two_ranks(rank, port, folder):
    build = critic_builder(rank, 2, port)
    cut = partial(configure, folder, micro_batch_tokens=128)
    jobs = {name: (cut(**changes), train) for name, changes in (SETTINGS | BFLOAT16).items()}
    jobs["frozen"] = (configure(folder, **FROZEN, zero_stage=3), train)
    jobs["resume"] = resume_job(configure(folder, zero_stage=3), f"{folder}/checkpoint2", learn)
    jobs |= {
        f"one_sample_{name}": (configure(folder, **changes), learn_one_sample)
        for name, changes in SHARDED.items()
    }
    last = build(configure(folder))
    results = run_jobs(build, jobs, "critic")
    last.close()
    torch.save(results, f"{folder}/two_ranks_{rank}.pt")


class PlainCritic(nn.Module):
    """Value of the state before each trained token, one sample a forward pass, eager attention.

    The state is the hidden state of the token before, or the mean of all up to there at equal size.
    """

    def __init__(self, folder, num_layers, head, *, pools=False):
        super().__init__()
        self.backbone = AutoModelForCausalLM.from_pretrained(
            folder / "model", attn_implementation="eager"
        ).model
        self.backbone.layers = self.backbone.layers[:num_layers]
        self.head, self.pools = head, pools

    def forward(self, sample):
        hidden = self.backbone(torch.tensor(sample.token_ids)[None], use_cache=False).last_hidden_state[
            0, :-1
        ]
        if self.pools:
            hidden = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
            hidden = torch.stack([hidden[: position + 1].mean(dim=0) for position in range(len(hidden))])
        return self.head(hidden[torch.tensor(sample.loss_mask)[1:]])[:, 0]


def plain_run(critic, parameters):
    """AdamW, torch's clipping, two steps of three dialogues an epoch; the loss as PPO2 has it, over the
    step's number of tokens."""
    torch.set_num_threads(1)
    settings, clip = CONFIG.critic, CONFIG.critic.value_clip
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    pairs = list(zip(*make_samples(), strict=True))
    parts = [
        [index for index, (sample, _) in enumerate(pairs) if (int(sample.dialogue_id) >= 3) == second]
        for second in (False, True)
    ]
    run = {
        "start": {name: tensor.clone() for name, tensor in critic.state_dict().items()},
        "norms": [],
        "values": [],
        "clipped": 0,
    }
    for _ in range(ITERATIONS):
        with torch.no_grad():
            old = [critic(sample) for sample, _ in pairs]
        run["values"].append(old)
        for part in parts * settings.epochs:
            optimizer.param_groups[0]["lr"] = settings.lr * min(
                1, (len(run["norms"]) + 1) / settings.warmup_steps
            )
            optimizer.zero_grad()
            total, count = 0.0, 0
            for index in part:
                sample, returns = pairs[index]
                values = critic(sample)
                squared = (values - returns) ** 2
                clipped = (old[index] + (values - old[index]).clamp(-clip, clip) - returns) ** 2
                total += 0.5 * torch.maximum(squared, clipped).sum()
                count += len(values)
                run["clipped"] += int((clipped > squared).sum())
            (total / count).backward()
            run["norms"].append(float(nn.utils.clip_grad_norm_(parameters, settings.grad_clip)))
            optimizer.step()
    steps = 2 * settings.epochs
    run["mean_norms"] = [
        sum(run["norms"][start : start + steps]) / steps for start in range(0, len(run["norms"]), steps)
    ]
    return run


@pytest.fixture(scope="module")
def trained_reference(folder):
    head = nn.Linear(SHAPE["hidden_size"], 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    critic = PlainCritic(folder, 2, head)
    run = plain_run(critic, list(critic.parameters()))
    return {**run, "weights": rename(critic.state_dict()), "start": rename(run["start"])}


def rename(weights):
    return {name.replace("head.", "head.layers.0."): tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def frozen_reference(folder):
    head = nn.Sequential(nn.Linear(SHAPE["hidden_size"], 8), nn.Tanh(), nn.Linear(8, 1))
    head.load_state_dict(ValueHead(SHAPE["hidden_size"], 8, CONFIG.seed).layers.state_dict())
    critic = PlainCritic(folder, 1, head, pools=True)
    run = plain_run(critic, list(head.parameters()))
    return {**run, "weights": {f"layers.{name}": tensor for name, tensor in head.state_dict().items()}}


def check_same_training(result, reference):
    assert grad_norms(result["metrics"], "critic") == pytest.approx(reference["mean_norms"], rel=1e-5)
    assert relative_error(result["weights"], reference["weights"]) < 1e-5
    for ours, expected in zip(result["values"], reference["values"], strict=True):
        torch.testing.assert_close(torch.cat(ours), torch.cat(expected), rtol=1e-4, atol=1e-5)
        assert [len(column) for column in ours] == [len(column) for column in expected]


def test_references_clip_both_ways(trained_reference, frozen_reference):
    for run in (trained_reference, frozen_reference):
        assert max(run["norms"]) > CONFIG.critic.grad_clip
        assert run["clipped"] > 10
    moved = [
        (trained_reference["weights"][name] - start).abs().max()
        for name, start in trained_reference["start"].items()
    ]
    assert min(moved) > 1e-4


@pytest.mark.parametrize("scenario", CUTS)
def test_one_rank_equals_plain_pytorch(scenario, one, trained_reference):
    check_same_training(one[scenario], trained_reference)


@pytest.mark.parametrize("scenario", SETTINGS)
def test_two_ranks_equal_plain_pytorch(scenario, two, trained_reference):
    for result in two:
        check_same_training(result[scenario], trained_reference)
    for ours, theirs in zip(*(result[scenario]["values"] for result in two), strict=True):
        assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_frozen_backbone_trains_the_head_alone(one, two, frozen_reference):
    for result in (one, *two):
        check_same_training(result["frozen"], frozen_reference)


def test_values_are_pickled_without_those_of_other_samples(one):
    for column in one["stage1"]["values"][0]:
        assert column.untyped_storage().nbytes() == column.nbytes


def test_metrics_pool_over_ranks(one, two):
    alone = reduce_metrics(one["stage2"]["metrics"][1])
    pooled = reduce_metrics(two[0]["stage2"]["metrics"][1] + two[1]["stage2"]["metrics"][1])
    keys = [key for key in alone if key.startswith("critic/")]
    assert {"critic/value_loss", "critic/clip_fraction", "critic/lr", "critic/explained_variance"} < set(keys)
    assert [pooled[key] for key in keys] == pytest.approx([alone[key] for key in keys], rel=1e-4, abs=1e-6)
    assert alone["critic/clip_fraction"] > 0


def test_explained_variance_of_the_returns(one):
    returns = torch.cat(make_samples()[1]).double()
    first, last = (
        (reduce_metrics(records), values)
        for records, values in zip(*(one["stage1"][key] for key in ("metrics", "values")), strict=True)
    )
    assert first[0]["critic/explained_variance"] == pytest.approx(0.0, abs=1e-12)
    assert first[0]["critic/value_mean"] == 0.0 and first[0]["critic/return_mean"] == pytest.approx(
        returns.mean().item()
    )
    error = returns - torch.cat(last[1]).double()
    expected = 1 - float((error - error.mean()).square().mean() / (returns - returns.mean()).square().mean())
    assert last[0]["critic/explained_variance"] == pytest.approx(expected) and expected != 0


@pytest.mark.parametrize("scenario", BFLOAT16)
def test_bfloat16_follows_float32(scenario, one, two, trained_reference):
    start = trained_reference["start"]
    expected = movement(trained_reference["weights"], start)
    for result in (one, *two):
        # AdamW moves the weights nearly alike for a multiple of the right gradient; its norm is that
        # multiple. Seen: up to 2e-3.
        assert grad_norms(result[scenario]["metrics"], "critic") == pytest.approx(
            trained_reference["mean_norms"], rel=1e-2
        )
        # Seen: 0.09.
        assert relative_error(movement(result[scenario]["weights"], start), expected) < 0.2


@pytest.mark.parametrize("scenario", ["resume", "resume_frozen", "resume_bfloat16"])
def test_resume_goes_on_as_if_uninterrupted(scenario, one, two):
    results = [one[scenario]] + ([result[scenario] for result in two] if scenario == "resume" else [])
    for uninterrupted, resumed in results:
        assert all(
            torch.equal(resumed["weights"][name], tensor) for name, tensor in uninterrupted["weights"].items()
        )
        assert torch.equal(torch.cat(resumed["values"]), torch.cat(uninterrupted["values"]))
        rates = [reduce_metrics(result["metrics"])["critic/lr"] for result in (uninterrupted, resumed)]
        assert rates == [pytest.approx(CONFIG.critic.lr)] * 2


@pytest.mark.parametrize("scenario", SHARDED)
def test_a_rank_without_work_keeps_step(scenario, one, two, trained_reference):
    results = [result[f"one_sample_{scenario}"] for result in two]
    metrics = reduce_metrics(results[0]["metrics"] + results[1]["metrics"])
    assert metrics["critic/value_loss"] > 0
    alone = one["one_sample"]
    assert relative_error(trained_reference["start"], alone["weights"]) > 1e-4
    for result in results:
        assert relative_error(result["weights"], alone["weights"]) < 1e-6
        norms = [grad_norms([run["metrics"]], "critic") for run in (result, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_no_sample_is_no_update(one):
    values, metrics = one["nothing"]
    assert values == []
    assert [metric.key for metric in metrics] == ["critic/skipped_steps", "time/critic_update_s"]


@pytest.mark.parametrize("name", DIVERGING)
def test_a_gradient_that_is_not_finite_changes_nothing_and_too_many_are_an_error(name, one):
    result = one[f"diverged_{name}"]
    for key, tensor in result["start"].items():
        assert torch.equal(result["weights"][key], tensor)
    metrics = reduce_metrics(result["metrics"])
    assert metrics["critic/skipped_steps"] == NUM_STEPS and "critic/value_loss" not in metrics
    assert result["error"].startswith("critic: the gradient was not finite in 5 optimizer steps in a row")
    assert "lower its lr" in result["error"]


def test_more_layers_than_the_model_has(folder):
    with pytest.raises(ConfigError, match=r"critic\.num_layers=3: the model has 2 layers"):
        load_backbone(str(folder / "model"), torch.float32, 3)
