"""The DeepSpeed learner against a plain PyTorch loop, over ranks, ZeRO stages, offload and ways of cutting a
batch."""

import dataclasses
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import Precision
from rlver_dist.config.learner import LearnerConfig, WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.experience.samples import ImitationSample
from rlver_dist.tracking.metrics import reduce_metrics
from tests.integration.learners import (
    CUTS,
    PROBE,
    VOCABULARY,
    draw_columns,
    grad_norms,
    movement,
    policy_builder,
    relative_error,
    resume,
    resume_job,
    save_model,
    turn_sample,
)
from tests.integration.ranks import BFLOAT16, SETTINGS, SHARDED, TIMEOUT_S, run_jobs
from tests.timing import hang_limit

CONFIG = RunConfig(
    model=ModelConfig(dtype=Precision.float32),
    algorithm=AlgorithmConfig(
        group_size=2, kl_coef=0.1, entropy_coef=0.01, updates_per_iteration=2, clip_low=0.1, clip_high=0.15
    ),
    rollout=RolloutConfig(temperature=0.7, dialogues_per_iteration=8),
    learner=LearnerConfig(
        lr=0.003, warmup_steps=3, weight_decay=0.1, grad_clip=0.05, micro_batch_tokens=4096, zero_stage=1
    ),
)
OTHERWISE = dict(lr=0.001, beta1=0.8, beta2=0.9, weight_decay=0.3, grad_clip=0.02)
WARM_UP = WarmUpConfig(dialogues=8, epochs=3, batch_size=2, lr=0.01)
TWO_RANKS = {**SETTINGS, "unshared": dict(zero_stage=2, share_prefixes=False)}
RESUMED = {
    "stage2": dict(zero_stage=2),
    "bfloat16_stage1": dict(dtype=Precision.bfloat16, zero_stage=1),
    "stage3": dict(zero_stage=3),
    "bfloat16_offload3": dict(dtype=Precision.bfloat16, zero_stage=3, offload_optimizer=True),
}
KL_COEF = 0.1
ITERATIONS = 3


def make_model(folder):
    save_model(folder / "model")


def make_samples():
    """Eight dialogues in four groups, with an advantage for each trained token: six with thinking, a sample a
    turn over a growing history, and two without, whose turns are one sample."""
    draw = random.Random(0)
    samples = []
    for dialogue in range(6):
        history = draw.choices(range(VOCABULARY), k=draw.randrange(5, 30))
        for turn in range(1 + dialogue % 3):
            reply = draw.choices(range(VOCABULARY), k=draw.randrange(2, 12))
            thinking = draw.choices(range(VOCABULARY), k=draw.randrange(1, 15))
            samples.append(make_sample(draw, dialogue, turn, history, [*thinking, *reply]))
            history = [*history, *reply, *draw.choices(range(VOCABULARY), k=draw.randrange(1, 10))]
    for dialogue in (6, 7):
        tokens = draw.choices(range(VOCABULARY), k=draw.randrange(40, 90))
        sample = make_sample(draw, dialogue, 0, tokens[:5], tokens[5:])
        sample.loss_mask = [position > 4 and (position // 7) % 2 == 1 for position in range(len(tokens))]
        samples.append(sample)
    return samples, draw_columns(draw, samples, -2, 2)


def make_sample(draw, dialogue, turn, context, trained):
    return turn_sample(
        [*context, *trained],
        [False] * len(context) + [True] * len(trained),
        [-6 + draw.uniform(-1, 1) for _ in trained],
        dialogue=dialogue,
        group=dialogue // 2,
        turn=turn,
    )


def one_dialogue():
    """A dialogue of three turns alone, which is work for one rank where its turns share their history."""
    samples, advantages = make_samples()
    chosen = [index for index, sample in enumerate(samples) if sample.dialogue_id == "2"]
    return [samples[index] for index in chosen], [advantages[index] for index in chosen], KL_COEF


def configure(folder, **changes):
    """CONFIG for the model in `folder`, with other fields of its groups."""
    model = {key: changes.pop(key) for key in ("dtype",) if key in changes}
    algorithm = {key: changes.pop(key) for key in ("kl_coef",) if key in changes}
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, path=f"{folder}/model", **model),
        algorithm=dataclasses.replace(CONFIG.algorithm, **algorithm),
        learner=dataclasses.replace(CONFIG.learner, **changes),
    )


def weights_of(learner):
    return {name: tensor.detach().float().clone() for name, tensor in learner.iter_full_tensors()}


def train(build, config):
    return train_on(build(config))


def train_on(learner):
    samples, advantages = make_samples()
    metrics = [learner.update(samples, advantages, KL_COEF) for _ in range(ITERATIONS)]
    return {"metrics": metrics, "weights": weights_of(learner), "probe": learner.probe(PROBE)}


def learn_one_dialogue(build, config):
    """What one dialogue, which is work for one rank, makes of the weights."""
    learner = build(config)
    return {"metrics": learner.update(*one_dialogue()), "weights": weights_of(learner)}


def learn(learner):
    """One iteration."""
    return {"metrics": learner.update(*make_samples(), KL_COEF), "weights": weights_of(learner)}


def imitate(learner):
    return {
        "metrics": learner.imitate(make_lessons(make_samples()[0]), WARM_UP, seed=5),
        "weights": weights_of(learner),
    }


def resume_warmed_up_job(config, directory):
    """The same from a checkpoint of a learner that has only been warmed up, on the folder that it
    exported."""

    def work(build, config):
        first = build(config)
        imitate(first)
        first.export(f"{directory}/warm_start")
        first.save(directory)
        resumed = build(config, warm_start=f"{directory}/warm_start")
        resumed.load(directory)
        return [learn(learner) for learner in (first, resumed)]

    return config, work


def resume_otherwise_job(folder, zero_stage):
    """The second update of a run that goes on with another learning rate, momentum, decay and clip."""
    directory = f"{folder}/stage{zero_stage}"

    def work(build, config):
        first, resumed = build(config), build(configure(folder, zero_stage=zero_stage, **OTHERWISE))
        learn(first)
        first.save(directory)
        resumed.load(directory)
        return learn(resumed)

    return configure(folder, zero_stage=zero_stage), work


def one_rank(_, port, folder):
    build = policy_builder(0, 1, port)
    results, (samples, _) = {}, make_samples()
    results["resume"], (_, resumed) = resume(build, configure(folder), f"{folder}/checkpoint", learn)
    results["resumed"] = results["resume"][1]
    resumed.write_weights(f"{folder}/weights.safetensors")
    resumed.export(f"{folder}/policy")
    results["kl_tokens"] = resumed.kl_tokens(samples)
    results["base_nll"] = build(configure(folder, kl_coef=0.0)).base_nll(samples)
    lonely = build(configure(folder))
    results["nothing"] = lonely.update([], [], KL_COEF)
    warmed_up = build(configure(folder))
    results["warm_up"] = imitate(warmed_up)
    warmed_up.export(f"{folder}/warmed_up")
    for name, learner in (
        ("after_warm_up", warmed_up),
        ("from_export", build(configure(folder), warm_start=f"{folder}/warmed_up")),
    ):
        kl_before = learner.kl_tokens(samples)
        results[name] = {**train_on(learner), "kl_before": kl_before, "base_nll": learner.base_nll(samples)}
    jobs = {name: (configure(folder, **changes), train) for name, changes in (CUTS | BFLOAT16).items()}
    jobs["one_dialogue"] = (configure(folder), learn_one_dialogue)
    jobs["resume_warmed_up"] = resume_warmed_up_job(
        configure(folder, dtype=Precision.bfloat16), f"{folder}/step_0"
    )
    jobs |= {f"otherwise{stage}": resume_otherwise_job(folder, stage) for stage in (0, 1, 2, 3)}
    results |= run_jobs(build, jobs, "learner")
    resumed.close()
    torch.save(results, f"{folder}/one_rank.pt")


def two_ranks(rank, port, folder):
    build = policy_builder(rank, 2, port)
    samples, _ = make_samples()
    cut = partial(configure, folder, micro_batch_tokens=128)
    jobs = {name: (cut(**changes), train) for name, changes in (TWO_RANKS | BFLOAT16).items()}
    jobs |= {
        f"one_dialogue_{name}": (configure(folder, **changes), learn_one_dialogue)
        for name, changes in SHARDED.items()
    }
    jobs |= {
        f"resume_{name}": resume_job(cut(**changes), f"{folder}/resume_{name}", learn)
        for name, changes in RESUMED.items()
    }
    jobs |= {f"warm_up{stage}": (cut(zero_stage=stage), warm_up_and_train) for stage in (1, 3)}
    results = run_jobs(build, jobs, "learner")
    sharded = build(cut(zero_stage=3))
    results["sharded"] = train_on(sharded)
    results["kl_tokens"] = sharded.kl_tokens(samples)
    results["metadata"] = sharded.metadata()
    results["base_nll"] = sharded.base_nll(samples)
    sharded.write_weights(f"{folder}/sharded.safetensors")
    sharded.close()
    torch.save(results, f"{folder}/two_ranks_{rank}.pt")


def warm_up_and_train(build, config):
    learner = build(config)
    return {**imitate(learner), "training": train_on(learner)}


def make_lessons(samples):
    """Each sample with its last trained tokens, from none to five, after another context, which grows along a
    dialogue but for one turn.

    Of two dialogues a later turn has none, so that it does not share their histories.
    """
    draw, lessons, contexts = random.Random(3), [], {}
    for number, sample in enumerate(samples):
        same = min((number + 1) % 6, sample.loss_mask[::-1].index(False))
        context = [
            *([] if number == 8 else contexts.get(sample.dialogue_id, [])),
            *draw.choices(range(VOCABULARY), k=9),
        ]
        reply = sample.token_ids[len(sample.token_ids) - same :]
        plain = make_sample(draw, int(sample.dialogue_id), sample.turn_index, context, reply)
        lessons.append(ImitationSample(sample=sample, plain=plain))
        contexts[sample.dialogue_id] = [*context, *reply]
    return lessons


def score_alone(model, sample, temperature):
    """Log-probs and entropies of a sample's trained tokens, from dense logits."""
    token_ids, mask = torch.tensor(sample.token_ids), torch.tensor(sample.loss_mask)[1:]
    log_softmax = torch.log_softmax(model(token_ids[None]).logits[0, :-1][mask] / temperature, dim=-1)
    return log_softmax.gather(-1, token_ids[1:][mask][:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(
        dim=-1
    )


def plain_step_loss(model, reference, batch, old):
    """The update's loss as the papers write it: sums over trained tokens over their number, a sample at a
    time."""
    algorithm, total, count, clipped = CONFIG.algorithm, 0.0, 0, 0
    for (sample, advantages), old_logprobs in zip(batch, old, strict=True):
        logprobs, entropies = score_alone(model, sample, CONFIG.rollout.temperature)
        with torch.no_grad():
            ref_logprobs, _ = score_alone(reference, sample, CONFIG.rollout.temperature)
        rollout = torch.tensor(
            [
                value
                for value, trained in zip(sample.rollout_logprobs, sample.loss_mask, strict=True)
                if trained
            ]
        )
        weight = (old_logprobs - rollout).exp().clamp(max=algorithm.tis_cap)
        ratio = (logprobs - old_logprobs).exp()
        surrogate = torch.minimum(
            ratio * advantages, ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantages
        )
        difference = ref_logprobs - logprobs
        k3 = difference.exp() - 1 - difference
        total += (-(weight * surrogate) + KL_COEF * k3 - algorithm.entropy_coef * entropies).sum()
        count += len(logprobs)
        clipped += int(
            (
                ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantages < ratio * advantages
            ).sum()
        )
    return total / count, clipped


class PlainLoop:
    """Plain PyTorch: AdamW, torch's clipping, one sample a forward pass. `learner` may change between
    steps."""

    def __init__(self, folder, learner):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        self.learner, self.norms = learner, []
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def step(self, loss):
        learner, (group,) = self.learner, self.optimizer.param_groups
        group["lr"] = learner.lr * min(1, (len(self.norms) + 1) / max(1, learner.warmup_steps))
        group["betas"], group["weight_decay"] = (learner.beta1, learner.beta2), learner.weight_decay
        self.optimizer.zero_grad()
        loss.backward()
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), learner.grad_clip)))
        self.optimizer.step()


def plain_iteration(loop, base, pairs):
    """Two steps of two groups; the number of tokens whose ratio was clipped."""
    first_half, clipped = sum(sample.group_id in "01" for sample, _ in pairs), 0
    with torch.no_grad():
        old = [score_alone(loop.model, sample, CONFIG.rollout.temperature)[0] for sample, _ in pairs]
    for part in (slice(0, first_half), slice(first_half, None)):
        loss, num_clipped = plain_step_loss(loop.model, base, pairs[part], old[part])
        loop.step(loss)
        clipped += num_clipped
    return clipped


@pytest.fixture(scope="module")
def reference_run(folder):
    """Reinforcement learning in plain PyTorch."""
    loop = PlainLoop(folder / "model", CONFIG.learner)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    start = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    pairs = list(zip(*make_samples(), strict=True))
    clipped = sum(plain_iteration(loop, base, pairs) for _ in range(ITERATIONS))
    mean_norms = [sum(loop.norms[2 * iteration : 2 * iteration + 2]) / 2 for iteration in range(ITERATIONS)]
    return {
        "model": loop.model,
        "start": start,
        "norms": loop.norms,
        "mean_norms": mean_norms,
        "clipped": clipped,
    }


@pytest.fixture(scope="module")
def reference_otherwise(folder):
    """Weights after one iteration with CONFIG and one with OTHERWISE, in plain PyTorch."""
    loop = PlainLoop(folder / "model", CONFIG.learner)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    pairs = list(zip(*make_samples(), strict=True))
    for learner in (CONFIG.learner, dataclasses.replace(CONFIG.learner, **OTHERWISE)):
        loop.learner = learner
        plain_iteration(loop, base, pairs)
    return loop.model.state_dict()


def distribution(model, sample):
    """Log-probs of the whole vocabulary at a sample's trained tokens."""
    logits = model(torch.tensor(sample.token_ids)[None]).logits[0, :-1][torch.tensor(sample.loss_mask)[1:]]
    return torch.log_softmax(logits / CONFIG.rollout.temperature, dim=-1)


def plain_imitation(model, base, lesson):
    """Loss of each trained token: what is not in `plain` by its likelihood, what is by its divergence from
    the base model there."""
    same = lesson.plain.num_trained
    ours = distribution(model, lesson.sample)
    tokens = torch.tensor(lesson.sample.token_ids)[torch.tensor(lesson.sample.loss_mask)]
    losses = -ours.gather(-1, tokens[:, None])[:, 0]
    if not same:
        return losses
    with torch.no_grad():
        theirs = distribution(base, lesson.plain)
    return torch.cat(
        [
            losses[:-same],
            torch.nn.functional.kl_div(ours[-same:], theirs, reduction="none", log_target=True).sum(-1),
        ]
    )


@pytest.fixture(scope="module")
def reference_warm_up(folder):
    """Supervised learning in plain PyTorch, whole dialogues a step; the model, and the losses of each step's
    tokens and replies' share."""
    loop = PlainLoop(folder / "model", dataclasses.replace(CONFIG.learner, lr=WARM_UP.lr, warmup_steps=0))
    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    dialogues = {}
    for lesson in make_lessons(make_samples()[0]):
        dialogues.setdefault(lesson.sample.dialogue_id, []).append(lesson)
    shuffler, order, steps = random.Random(5), list(dialogues.values()), []
    assert (len(order), sum(map(len, order)), WARM_UP.batch_size) == (8, 14, 2)
    for _ in range(WARM_UP.epochs):
        shuffler.shuffle(order)
        # Seven steps: single dialogues, which leave a second rank without work, and the last two.
        for part in (*([members] for members in order[:6]), order[6:]):
            batch = [lesson for members in part for lesson in members]
            costs = [plain_imitation(loop.model, base, lesson) for lesson in batch]
            ends = [len(cost) - lesson.plain.num_trained for cost, lesson in zip(costs, batch, strict=True)]
            split = [(cost[:end], cost[end:]) for cost, end in zip(costs, ends, strict=True)]
            steps.append([torch.cat(parts).mean().item() for parts in zip(*split, strict=True)])
            loop.learner = dataclasses.replace(
                loop.learner, lr=WARM_UP.lr * (1 - (len(steps) - 1) / (7 * WARM_UP.epochs))
            )
            loop.step(torch.cat(costs).mean())
    return {"model": loop.model, "steps": steps}


def check_same_training(result, reference_run):
    assert grad_norms(result["metrics"], "learner") == pytest.approx(reference_run["mean_norms"], rel=1e-5)
    assert relative_error(result["weights"], reference_run["model"].state_dict()) < 1e-5


def test_reference_run_clips_both_ways(reference_run):
    assert min(reference_run["norms"]) > CONFIG.learner.grad_clip
    assert reference_run["clipped"] > 10
    assert relative_error(reference_run["start"], reference_run["model"].state_dict()) > 1e-2


@pytest.mark.parametrize("scenario", CUTS)
def test_one_rank_equals_plain_pytorch(scenario, one, reference_run):
    check_same_training(one[scenario], reference_run)


@pytest.mark.parametrize("scenario", [*TWO_RANKS, "sharded"])
def test_two_ranks_equal_one(scenario, two, reference_run):
    for result in two:
        check_same_training(result[scenario], reference_run)
    pooled = reduce_metrics(two[0][scenario]["metrics"][0] + two[1][scenario]["metrics"][0])
    samples, _ = make_samples()
    assert pooled["learner/trained_tokens"] == sum(sum(sample.loss_mask) for sample in samples)
    assert pooled["learner/optimizer_steps"] == 2


def test_metrics_pool_over_ranks(one, two):
    alone = reduce_metrics(one["stage1"]["metrics"][1])
    pooled = reduce_metrics(two[0]["stage1"]["metrics"][1] + two[1]["stage1"]["metrics"][1])
    assert alone["time/policy_update_s"] > 0
    keys = [key for key in alone if key.startswith("learner/")]
    assert {"learner/kl_ref", "learner/clip_fraction", "learner/entropy", "learner/logprob_gap"} < set(keys)
    assert [pooled[key] for key in keys] == pytest.approx([alone[key] for key in keys], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scenario", BFLOAT16)
def test_bfloat16_follows_float32(scenario, one, two, reference_run):
    start, (first, *later) = reference_run["start"], reference_run["mean_norms"]
    expected = movement(reference_run["model"].state_dict(), start)
    for result in (one, *two):
        # Seen: 0.08 to 0.14.
        assert relative_error(movement(result[scenario]["weights"], start), expected) < 0.2
        # A multiple of the right gradient moves the weights alike, as AdamW and a clip that is always active
        # have it, but not the norm. Seen: up to 8e-3 in the first iteration, and as the weights part up to
        # 8e-2 in later ones.
        norms = grad_norms(result[scenario]["metrics"], "learner")
        assert norms[0] == pytest.approx(first, rel=2e-2)
        assert norms[1:] == pytest.approx(later, rel=0.3)


def test_probe_is_the_models_own_logprob_at_temperature_one(one, reference_run):
    tokens = torch.tensor(PROBE)
    with torch.no_grad():
        expected = torch.log_softmax(reference_run["model"](tokens[None]).logits[0, :-1], dim=-1).gather(
            -1, tokens[1:, None]
        )[:, 0]
    assert one["stage1"]["probe"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("scenario", ["resume", "resume_warmed_up", *(f"resume_{name}" for name in RESUMED)])
def test_resume_goes_on_as_if_uninterrupted(scenario, one, two):
    for result in [one] if scenario in one else two:
        uninterrupted, resumed = result[scenario]
        for name, tensor in uninterrupted["weights"].items():
            assert torch.equal(resumed["weights"][name], tensor), name
        rates = [reduce_metrics(learner["metrics"])["learner/lr"] for learner in (uninterrupted, resumed)]
        # Steps 1 and 2 of a warm-up of 3, where they are the first.
        assert rates == pytest.approx(
            [CONFIG.learner.lr * (0.5 if scenario == "resume_warmed_up" else 1)] * 2
        )


def test_resume_goes_on_with_the_options_of_its_configuration(one, reference_otherwise):
    for stage in (0, 1, 2, 3):
        resumed = one[f"otherwise{stage}"]
        assert reduce_metrics(resumed["metrics"])["learner/lr"] == pytest.approx(OTHERWISE["lr"])
        assert relative_error(resumed["weights"], reference_otherwise) < 1e-5, stage


def test_weight_file_has_every_tensor_and_the_tied_head(one, folder):
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == one["resumed"]["weights"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in one["resumed"]["weights"].items())
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_sharded_weights_come_out_whole(two, folder):
    weights = load_file(folder / "sharded.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        name: shape for name, _, shape in two[0]["metadata"]
    }
    assert all(torch.equal(weights[name], tensor) for name, tensor in two[1]["sharded"]["weights"].items())


def test_export_loads_in_transformers(one, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert all(
        torch.equal(one["resumed"]["weights"][name], tensor) for name, tensor in model.state_dict().items()
    )
    messages = [{"role": "user", "content": "hello"}]
    ours, original = (AutoTokenizer.from_pretrained(path) for path in (folder / "policy", folder / "model"))
    assert ours.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )


def test_kl_tokens_and_base_nll(one, two, folder):
    samples, _ = make_samples()
    policy, base = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    with torch.no_grad():
        nll = -sum(float(score_alone(base, sample, 1.0)[0].sum()) for sample in samples)
        policy.load_state_dict(one["resumed"]["weights"])
        temperature = CONFIG.rollout.temperature
        differences = [
            score_alone(base, sample, temperature)[0] - score_alone(policy, sample, temperature)[0]
            for sample in samples
        ]
    for ours, difference in zip(one["kl_tokens"], differences, strict=True):
        torch.testing.assert_close(ours, difference.exp() - 1 - difference, rtol=1e-3, atol=1e-6)
    count = sum(sum(sample.loss_mask) for sample in samples)
    for result in (one, *two):
        assert result["base_nll"] == (pytest.approx(nll, rel=1e-5), count)
    assert all(
        torch.equal(*columns) for columns in zip(two[0]["kl_tokens"], two[1]["kl_tokens"], strict=True)
    )
    assert [len(column) for column in two[0]["kl_tokens"]] == [sum(sample.loss_mask) for sample in samples]
    assert all(column.any() for column in two[0]["kl_tokens"])


@pytest.mark.parametrize("scenario", SHARDED)
def test_a_rank_without_work_neither_waits_nor_pulls(scenario, one, two, reference_run):
    alone = one["one_dialogue"]
    assert relative_error(reference_run["start"], alone["weights"]) > 1e-4
    results = [result[f"one_dialogue_{scenario}"] for result in two]
    trained = sorted(reduce_metrics(result["metrics"])["learner/trained_tokens"] for result in results)
    assert trained == [0, sum(sample.num_trained for sample in one_dialogue()[0])]
    for result in results:
        assert relative_error(result["weights"], alone["weights"]) < 1e-6
        norms = [grad_norms([run["metrics"]], "learner") for run in (result, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_warm_up_equals_plain_pytorch(one, two, reference_warm_up):
    steps = reference_warm_up["steps"]
    # A step takes one dialogue or two, so an epoch of seven is what compares.
    assert (
        sum(format_nll for format_nll, _ in steps[-7:]) < sum(format_nll for format_nll, _ in steps[:7]) - 1
    )
    runs = [([one["warm_up"]["metrics"]], one["warm_up"]["weights"])]
    for stage in (1, 3):
        metrics = [result[f"warm_up{stage}"]["metrics"] for result in two]
        runs += [(metrics, result[f"warm_up{stage}"]["weights"]) for result in two]
    for metrics, weights in runs:
        pooled = reduce_metrics([metric for records in metrics for metric in records])
        for name, losses in (("first", steps[0]), ("last", steps[-1])):
            assert [pooled[f"warm_up/{loss}_{name}"] for loss in ("format_nll", "reply_kl")] == pytest.approx(
                losses, rel=1e-5, nan_ok=True
            )
        assert pooled["warm_up/steps"] == len(steps)
        assert relative_error(weights, reference_warm_up["model"].state_dict()) < 1e-5


def test_after_warm_up_the_learner_is_as_one_built_on_the_exported_weights(one, two):
    ours, built = one["after_warm_up"], one["from_export"]
    assert all(torch.equal(ours["weights"][name], tensor) for name, tensor in built["weights"].items())
    assert not any(column.any() for result in (ours, built) for column in result["kl_before"])
    for step in range(ITERATIONS):
        metrics, expected = (
            {
                metric.key: metric.value
                for metric in result["metrics"][step]
                if metric.key.startswith("learner/")
            }
            for result in (ours, built)
        )
        assert metrics == expected
    assert ours["base_nll"] == built["base_nll"] == one["base_nll"]
    for result in two:
        for stage in (1, 3):
            assert relative_error(result[f"warm_up{stage}"]["training"]["weights"], built["weights"]) < 1e-4


def test_set_up_compiles_the_op_that_a_learner_loads(tmp_path):
    command = ["-m", "rlver_dist.learner.engine", "--build-ops"]
    assert (
        f".venv/bin/python {' '.join(command)}"
        in (Path(__file__).parents[2] / "launch" / "setup.sh").read_text()
    )
    elsewhere = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, *command],
        check=True,
        capture_output=True,
        timeout=hang_limit(TIMEOUT_S),
        env=elsewhere,
    )
    assert list(tmp_path.glob("**/deepspeed_shm_comm.so"))


def test_no_shared_memory_is_left_behind(one, two):
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_*"))


def test_no_sample_is_no_update(one):
    metrics = reduce_metrics(one["nothing"])
    assert metrics["learner/optimizer_steps"] == 0 and metrics["learner/trained_tokens"] == 0
