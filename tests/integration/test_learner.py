"""The DeepSpeed learner against a plain PyTorch loop, over ranks, ZeRO stages and ways of cutting a batch.

Learners run in spawned processes, one a rank, since DeepSpeed keeps process-wide state; all one-rank scenarios share a process.
"""

import dataclasses
import random
import socket

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rlver_dist.choices import Precision
from rlver_dist.config import AlgorithmConfig, LearnerConfig, ModelConfig, RolloutConfig, RunConfig
from rlver_dist.experience.samples import TurnSample
from rlver_dist.models import TINY, resolve
from rlver_dist.tracking.metrics import reduce_metrics

CONFIG = RunConfig(
    model=ModelConfig(dtype=Precision.float32),
    algorithm=AlgorithmConfig(kl_coef=0.1, entropy_coef=0.01, updates_per_iteration=2, clip_low=0.1, clip_high=0.15),
    rollout=RolloutConfig(temperature=0.7, batch_size=4),
    learner=LearnerConfig(lr=0.003, warmup_steps=3, weight_decay=0.1, grad_clip=0.05, micro_batch_tokens=4096, zero_stage=1),
)
ITERATIONS = 2
VOCABULARY = 400
PROBE = [1, 345, 67, 42, 7, 11]


def make_model(folder):
    """A random model small enough that float32 sums over all its weights keep five digits; its tokenizer is only for the export."""
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(resolve(TINY)).save_pretrained(folder / "model")


def make_samples():
    draw = random.Random(0)
    samples, advantages = [], []
    for index in range(8):
        length = draw.randrange(12, 90)
        mask = [position > 4 and (position // 7) % 2 == 1 for position in range(length)]
        samples.append(
            TurnSample(
                token_ids=[draw.randrange(VOCABULARY) for _ in range(length)],
                loss_mask=mask,
                rollout_logprobs=[-6 + draw.uniform(-1, 1) if trained else 0.0 for trained in mask],
                reward=0.0,
                dialogue_id=str(index),
                group_id=str(index // 2),
                turn_index=0,
            )
        )
        advantages.append(draw.uniform(-2, 2))
    return samples, advantages


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


def train(learner):
    samples, advantages = make_samples()
    metrics = [learner.update(samples, advantages) for _ in range(ITERATIONS)]
    return {"metrics": metrics, "weights": weights_of(learner), "probe": learner.probe(PROBE)}


def one_rank(_, port, folder):
    build = build_learner(0, 1, port)
    results = {
        "plain": train(build(configure(folder))),
        "many_micro_batches": train(build(configure(folder, micro_batch_tokens=128))),
        "recompute": train(build(configure(folder, gradient_checkpointing=True))),
        "stage0": train(build(configure(folder, zero_stage=0))),
        "stage2": train(build(configure(folder, zero_stage=2))),
        "stage3": train(build(configure(folder, zero_stage=3))),
        "bfloat16": train(build(configure(folder, dtype=Precision.bfloat16))),
    }
    samples, advantages = make_samples()
    uninterrupted = build(configure(folder))
    uninterrupted.update(samples, advantages)
    uninterrupted.save(f"{folder}/checkpoint")
    resumed = build(configure(folder))
    resumed.load(f"{folder}/checkpoint")
    for name, learner in (("uninterrupted", uninterrupted), ("resumed", resumed)):
        results[name] = {"metrics": [learner.update(samples, advantages)], "weights": weights_of(learner)}
    resumed.write_weights(f"{folder}/weights.safetensors")
    resumed.export(f"{folder}/policy")
    results["kl_sums"] = resumed.kl_sums(samples)
    results["base_nll"] = build(configure(folder, kl_coef=0.0)).base_nll(samples)
    results["nothing"] = build(configure(folder)).update([], [])
    resumed.close()
    torch.save(results, f"{folder}/one_rank.pt")


def two_ranks(rank, port, folder):
    build = build_learner(rank, 2, port)
    samples, _ = make_samples()
    results = {f"stage{stage}": train(build(configure(folder, zero_stage=stage, micro_batch_tokens=128))) for stage in (0, 1, 2)}
    sharded = build(configure(folder, zero_stage=3, micro_batch_tokens=128))
    results["stage3"] = train(sharded)
    results["kl_sums"] = sharded.kl_sums(samples)
    results["metadata"] = sharded.metadata()
    results["base_nll"] = sharded.base_nll(samples)
    sharded.write_weights(f"{folder}/sharded.safetensors")
    sharded.close()
    torch.save(results, f"{folder}/two_ranks_{rank}.pt")


def build_learner(rank, world_size, port):
    from rlver_dist.learner.policy import PolicyLearner

    place = dict(rank=rank, world_size=world_size, master_address="127.0.0.1", master_port=port, device="cpu", num_threads=1)
    return lambda config: PolicyLearner(config=config, **place)


def spawn(target, world_size, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(target, (port, str(folder)), nprocs=world_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learner")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    spawn(one_rank, 1, folder)
    return torch.load(folder / "one_rank.pt", weights_only=False)


@pytest.fixture(scope="module")
def two(folder):
    spawn(two_ranks, 2, folder)
    return [torch.load(folder / f"two_ranks_{rank}.pt", weights_only=False) for rank in (0, 1)]


def score_alone(model, sample, temperature):
    """Log-probs and entropies of a sample's trained tokens, from dense logits."""
    token_ids, mask = torch.tensor(sample.token_ids), torch.tensor(sample.loss_mask)[1:]
    log_softmax = torch.log_softmax(model(token_ids[None]).logits[0, :-1][mask] / temperature, dim=-1)
    return log_softmax.gather(-1, token_ids[1:][mask][:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(dim=-1)


def plain_step_loss(model, reference, batch, old):
    """The update's loss as the papers write it: sums over trained tokens over their number, a sample at a time."""
    algorithm, total, count, clipped = CONFIG.algorithm, 0.0, 0, 0
    for (sample, advantage), old_logprobs in zip(batch, old, strict=True):
        logprobs, entropies = score_alone(model, sample, CONFIG.rollout.temperature)
        with torch.no_grad():
            ref_logprobs, _ = score_alone(reference, sample, CONFIG.rollout.temperature)
        rollout = torch.tensor([value for value, trained in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if trained])
        weight = (old_logprobs - rollout).exp().clamp(max=algorithm.tis_cap)
        ratio = (logprobs - old_logprobs).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantage)
        difference = ref_logprobs - logprobs
        k3 = difference.exp() - 1 - difference
        total += (-(weight * surrogate) + algorithm.kl_coef * k3 - algorithm.entropy_coef * entropies).sum()
        count += len(logprobs)
        clipped += int((ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high) * advantage < ratio * advantage).sum())
    return total / count, clipped


@pytest.fixture(scope="module")
def reference_run(folder):
    """Plain PyTorch: AdamW, torch's clipping, one sample a forward pass, two steps of two groups an iteration."""
    torch.set_num_threads(1)
    model, base = (AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager") for _ in range(2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = CONFIG.learner
    betas = (learner.beta1, learner.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learner.lr, betas=betas, weight_decay=learner.weight_decay)
    norms, clipped = [], 0
    pairs = list(zip(*make_samples(), strict=True))
    for _ in range(ITERATIONS):
        with torch.no_grad():
            old = [score_alone(model, sample, CONFIG.rollout.temperature)[0] for sample, _ in pairs]
        for part in (slice(0, 4), slice(4, 8)):
            optimizer.param_groups[0]["lr"] = learner.lr * min(1, (len(norms) + 1) / learner.warmup_steps)
            optimizer.zero_grad()
            loss, num_clipped = plain_step_loss(model, base, pairs[part], old[part])
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), learner.grad_clip)))
            optimizer.step()
            clipped += num_clipped
    return {"model": model, "start": start, "norms": norms, "clipped": clipped}


def relative_error(weights, expected):
    """Norm of the difference over the norm of the expected tensors, all tensors as one vector."""
    squares = [((weights[name] - tensor).square().sum(), tensor.square().sum()) for name, tensor in expected.items()]
    difference, size = (float(sum(parts)) ** 0.5 for parts in zip(*squares, strict=True))
    return difference / size


def check_same_training(result, reference_run):
    norms = [sum(reference_run["norms"][2 * step : 2 * step + 2]) / 2 for step in range(ITERATIONS)]
    metrics = [reduce_metrics(records) for records in result["metrics"]]
    assert [record["learner/grad_norm"] for record in metrics] == pytest.approx(norms, rel=1e-5)
    assert relative_error(result["weights"], reference_run["model"].state_dict()) < 1e-5


def test_reference_run_clips_both_ways(reference_run):
    assert min(reference_run["norms"]) > CONFIG.learner.grad_clip
    assert reference_run["clipped"] > 10
    assert relative_error(reference_run["start"], reference_run["model"].state_dict()) > 1e-2


@pytest.mark.parametrize("scenario", ["plain", "many_micro_batches", "recompute", "stage0", "stage2", "stage3"])
def test_one_rank_equals_plain_pytorch(scenario, one, reference_run):
    check_same_training(one[scenario], reference_run)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(stage, two, reference_run):
    for result in two:
        check_same_training(result[f"stage{stage}"], reference_run)
    pooled = reduce_metrics(two[0][f"stage{stage}"]["metrics"][0] + two[1][f"stage{stage}"]["metrics"][0])
    samples, _ = make_samples()
    assert pooled["learner/trained_tokens"] == sum(sum(sample.loss_mask) for sample in samples)
    assert pooled["learner/optimizer_steps"] == 2


def test_metrics_pool_over_ranks(one, two):
    alone = reduce_metrics(one["plain"]["metrics"][1])
    pooled = reduce_metrics(two[0]["stage1"]["metrics"][1] + two[1]["stage1"]["metrics"][1])
    keys = [key for key in alone if key.startswith("learner/")]
    assert {"learner/kl_ref", "learner/clip_fraction", "learner/entropy", "learner/logprob_gap"} < set(keys)
    assert [pooled[key] for key in keys] == pytest.approx([alone[key] for key in keys], rel=1e-4, abs=1e-6)


def test_bfloat16_follows_float32(one, reference_run):
    start, end = reference_run["start"], one["bfloat16"]["weights"]
    expected = {name: tensor - start[name] for name, tensor in reference_run["model"].state_dict().items()}
    moved = {name: end[name] - start[name] for name in expected}
    assert relative_error(moved, expected) < 0.3


def test_probe_is_the_models_own_logprob_at_temperature_one(one, reference_run):
    tokens = torch.tensor(PROBE)
    with torch.no_grad():
        expected = torch.log_softmax(reference_run["model"](tokens[None]).logits[0, :-1], dim=-1).gather(-1, tokens[1:, None])[:, 0]
    assert one["plain"]["probe"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_resume_goes_on_as_if_uninterrupted(one):
    for name, tensor in one["uninterrupted"]["weights"].items():
        assert torch.equal(one["resumed"]["weights"][name], tensor), name
    rates = [reduce_metrics(one[name]["metrics"][0])["learner/lr"] for name in ("uninterrupted", "resumed")]
    assert rates == [CONFIG.learner.lr] * 2


def test_weight_file_has_every_tensor_and_the_tied_head(one, folder):
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == one["resumed"]["weights"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in one["resumed"]["weights"].items())
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_sharded_weights_come_out_whole(two, folder):
    weights = load_file(folder / "sharded.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {name: shape for name, _, shape in two[0]["metadata"]}
    assert all(torch.equal(weights[name], tensor) for name, tensor in two[1]["stage3"]["weights"].items())


def test_export_loads_in_transformers(one, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert all(torch.equal(one["resumed"]["weights"][name], tensor) for name, tensor in model.state_dict().items())
    messages = [{"role": "user", "content": "hello"}]
    ours, original = (AutoTokenizer.from_pretrained(path) for path in (folder / "policy", folder / "model"))
    assert ours.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)


def test_kl_sums_and_base_nll(one, two, folder):
    samples, _ = make_samples()
    policy, base = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    with torch.no_grad():
        nll = -sum(float(score_alone(base, sample, 1.0)[0].sum()) for sample in samples)
        policy.load_state_dict(one["resumed"]["weights"])
        temperature = CONFIG.rollout.temperature
        differences = [score_alone(base, sample, temperature)[0] - score_alone(policy, sample, temperature)[0] for sample in samples]
    expected = [float((difference.exp() - 1 - difference).sum()) for difference in differences]
    assert one["kl_sums"] == pytest.approx(expected, rel=1e-3)
    count = sum(sum(sample.loss_mask) for sample in samples)
    for result in (one, *two):
        assert result["base_nll"] == (pytest.approx(nll, rel=1e-5), count)
    assert two[0]["kl_sums"] == two[1]["kl_sums"]


def test_no_sample_is_no_update(one):
    metrics = reduce_metrics(one["nothing"])
    assert metrics["learner/optimizer_steps"] == 0 and metrics["learner/trained_tokens"] == 0
