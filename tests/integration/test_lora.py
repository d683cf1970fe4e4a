"""LoRA in the DeepSpeed learner: what trains, what leaves the learner, and that PEFT agrees."""

import random
import sys
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import Precision
from rlver_dist.config.learner import LearnerConfig, WarmUpConfig
from rlver_dist.config.model import LoraConfig, ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.errors import ConfigError
from rlver_dist.experience.samples import ImitationSample
from rlver_dist.learner import lora
from tests.integration.learners import (
    PROBE,
    VOCABULARY,
    movement,
    policy_builder,
    relative_error,
    save_model,
    turn_sample,
)

ADAPTERS = LoraConfig(rank=4, alpha=16.0)
UPDATES = 2


def make_model(folder):
    """Qwen2 with a tied head and Llama without."""
    save_model(folder / "qwen2")
    save_model(folder / "llama", "llama", tied=False)


def make_samples():
    """Two groups of two samples, and an advantage for each of their trained tokens."""
    draw = random.Random(0)
    samples, advantages = [], []
    for index in range(4):
        mask = [position > 4 and (position // 7) % 2 == 1 for position in range(draw.randrange(20, 70))]
        token_ids = [draw.randrange(VOCABULARY) for _ in mask]
        logprobs = [-6 + draw.uniform(-1, 1) for _ in range(sum(mask))]
        samples.append(turn_sample(token_ids, mask, logprobs, dialogue=index, group=index // 2))
        advantages.append(torch.full((sum(mask),), draw.uniform(-2, 2)))
    return samples, advantages


def configure(folder, family="qwen2", *, dtype=Precision.float32, kl_coef=0.0, **changes):
    return RunConfig(
        model=ModelConfig(path=f"{folder}/{family}", dtype=dtype, lora=ADAPTERS),
        algorithm=AlgorithmConfig(updates_per_iteration=2, kl_coef=kl_coef),
        rollout=RolloutConfig(temperature=0.7),
        learner=LearnerConfig(lr=0.01, warmup_steps=1, micro_batch_tokens=128, **changes),
    )


def weights_of(learner):
    return {name: tensor.clone() for name, tensor in learner.iter_full_tensors()}


def train(learner):
    start = weights_of(learner)
    for _ in range(UPDATES):
        learner.update(*make_samples(), 0.0)
    return {
        "start": start,
        "weights": weights_of(learner),
        "metadata": learner.metadata(),
        "probe": learner.probe(PROBE),
    }


def saved_parameters(directory):
    """Base and adapters by PEFT's names, as a checkpoint holds them."""
    saved = torch.load(f"{directory}/policy/mp_rank_00_model_states.pt", weights_only=False)
    return {name.removeprefix("model."): tensor for name, tensor in saved["module"].items()}


def one_rank(_, port, folder):
    build, configured = policy_builder(0, 1, port), partial(configure, folder)
    results = {
        "recompute": train(build(configured(gradient_checkpointing=True))),
        "bfloat16": train(build(configured(dtype=Precision.bfloat16))),
    }
    results["offload3"] = train(build(configured(zero_stage=3, offload_optimizer=True)))
    for name, family, changes in (
        ("stage1", "qwen2", {}),
        ("stage3", "qwen2", {"zero_stage": 3}),
        ("llama", "llama", {}),
    ):
        learner = build(configured(family, **changes))
        results[name] = train(learner)
        learner.write_weights(f"{folder}/{name}.safetensors")
        learner.export(f"{folder}/exported_{name}")
        learner.save(f"{folder}/saved_{name}")
        if name != "stage3":
            results[name]["parts"] = saved_parameters(f"{folder}/saved_{name}")
        resumed = build(configured(family, **changes))
        resumed.load(f"{folder}/saved_{name}")
        for key, continued in (("uninterrupted", learner), ("resumed", resumed)):
            continued.update(*make_samples(), 0.0)
            results[name][key] = weights_of(continued)
    for stage in (1, 3):
        warmed_up = configured(zero_stage=stage, kl_coef=0.1)
        results[f"warmed_up{stage}"] = warm_up(build, warmed_up, f"{folder}/warmed_up{stage}")
    learner.close()
    torch.save(results, f"{folder}/one_rank.pt")


def warm_up(build, config, saved):
    learner, resumed = (build(config) for _ in range(2))
    samples, _ = make_samples()
    untaught = [replace(sample, loss_mask=[False for _ in sample.token_ids]) for sample in samples]
    lessons = [
        ImitationSample(sample=sample, plain=plain) for sample, plain in zip(samples, untaught, strict=True)
    ]
    learner.imitate(lessons, WarmUpConfig(lr=0.01), 0)
    weights, kl_tokens = weights_of(learner), [torch.cat(learner.kl_tokens(samples))]
    learner.update(*make_samples(), 0.1)
    kl_tokens.append(torch.cat(learner.kl_tokens(samples)))
    learner.save(saved)
    resumed.load(saved)
    return {
        "weights": weights,
        "updated": weights_of(learner),
        "resumed": weights_of(resumed),
        "kl_tokens": kl_tokens,
    }


def two_ranks(rank, port, folder):
    build = policy_builder(rank, 2, port)
    results = {"stage1": train(build(configure(folder)))}
    last = build(configure(folder, zero_stage=3))
    results["stage3"] = train(last)
    last.write_weights(f"{folder}/two_ranks.safetensors")
    last.close()
    torch.save(results, f"{folder}/two_ranks_{rank}.pt")


def load(folder, family, **options):
    return AutoModelForCausalLM.from_pretrained(folder / family, **options)


def original(folder, family):
    return dict(load(folder, family).named_parameters(remove_duplicate=False))


def distance(ours, theirs, start):
    """Norm of the difference of two results over the norm of what the second moved, all tensors as one
    vector."""
    return relative_error(movement(ours, start), movement(theirs, start))


LEARNERS = [("stage1", "qwen2"), ("stage3", "qwen2"), ("llama", "llama")]


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_before_training_the_policy_is_the_base(name, family, one, folder):
    base = original(folder, family)
    assert list(one[name]["start"]) == list(base)
    assert all(torch.equal(one[name]["start"][key], tensor) for key, tensor in base.items())


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_every_linear_layer_but_the_head_moves_and_nothing_else(name, family, one, folder):
    moved = {
        key
        for key, tensor in original(folder, family).items()
        if not torch.equal(one[name]["weights"][key], tensor)
    }
    assert moved == {key for key in one[name]["weights"] if key.endswith("_proj.weight")}


@pytest.mark.parametrize("name", ["stage1", "llama"])
def test_base_stays_and_the_merged_policy_is_pefts_own(name, one, folder):
    family = dict(LEARNERS)[name]
    base, parts = original(folder, family), one[name]["parts"]
    frozen = {
        key.replace(".base_layer.", "."): tensor for key, tensor in parts.items() if ".lora_" not in key
    }
    assert frozen.keys() == base.keys() and all(
        torch.equal(frozen[key], tensor) for key, tensor in base.items()
    )
    settings = peft.LoraConfig(r=ADAPTERS.rank, lora_alpha=ADAPTERS.alpha, target_modules="all-linear")
    theirs = peft.get_peft_model(load(folder, family), settings)
    theirs.base_model.model.load_state_dict(parts)
    merged = dict(theirs.merge_and_unload().named_parameters(remove_duplicate=False))
    assert merged.keys() == one[name]["weights"].keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(one[name]["weights"][key], tensor.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_weight_file_and_metadata_are_those_of_a_whole_model(name, family, one, folder):
    shapes = {key: tuple(tensor.shape) for key, tensor in original(folder, family).items()}
    written = load_file(folder / f"{name}.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes
    assert one[name]["metadata"] == [(key, torch.float32, shape) for key, shape in shapes.items()]
    assert all(torch.equal(written[key], tensor) for key, tensor in one[name]["weights"].items())


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_exported_folder_needs_no_peft(name, family, one, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    tokens = torch.tensor(PROBE)
    model = load(folder, f"exported_{name}")
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], dim=-1).gather(-1, tokens[1:, None])[
            :, 0
        ]
    assert one[name]["probe"] == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert {path.name for path in (folder / f"exported_{name}").iterdir()} == {
        path.name for path in (folder / family).iterdir()
    }


@pytest.mark.parametrize("name", ["recompute", "stage3", "offload3"])
def test_one_rank_trains_alike_however_it_computes(name, one):
    plain = one["stage1"]
    assert distance(one[name]["weights"], plain["weights"], plain["start"]) < 1e-4


@pytest.mark.parametrize("name", ["stage1", "stage3"])
def test_two_ranks_equal_one(name, one, two, folder):
    plain = one["stage1"]
    for result in two:
        assert distance(result[name]["weights"], plain["weights"], plain["start"]) < 1e-4
    written = load_file(folder / "two_ranks.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in two[1]["stage3"]["weights"].items())


@pytest.mark.parametrize(("name", "family"), LEARNERS)
def test_resume_goes_on_as_if_uninterrupted(name, family, one):
    for key, tensor in one[name]["uninterrupted"].items():
        assert torch.equal(one[name]["resumed"][key], tensor), key
    assert distance(one[name]["resumed"], one[name]["weights"], one[name]["start"]) > 1e-2


@pytest.mark.parametrize("stage", [1, 3])
def test_warm_up_trains_adapters_and_is_the_base_from_then_on(stage, one, folder):
    base, result = original(folder, "qwen2"), one[f"warmed_up{stage}"]
    for before, after in ((base, result["weights"]), (result["weights"], result["updated"])):
        assert {key for key in base if not torch.equal(before[key], after[key])} == {
            key for key in base if key.endswith("_proj.weight")
        }
    # A learner on the model's own folder takes the warmed-up base from the checkpoint.
    assert all(torch.equal(result["resumed"][key], tensor) for key, tensor in result["updated"].items())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_kl_reference_is_the_warmed_up_base_without_adapters(stage, one):
    at_first, updated = one[f"warmed_up{stage}"]["kl_tokens"]
    assert at_first.abs().max() < 1e-5 < 1e-3 < updated.abs().max()


def test_bfloat16_follows_float32(one):
    ours, plain = one["bfloat16"], one["stage1"]
    assert {dtype for _, dtype, _ in ours["metadata"]} == {torch.bfloat16}
    weights = {name: tensor.float() for name, tensor in ours["weights"].items()}
    assert distance(weights, plain["weights"], plain["start"]) < 0.15


def test_merging_rounds_once_and_leaves_the_base():
    torch.manual_seed(0)
    base, down, up = (
        torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((64, 48), (2, 48), (64, 2))
    )
    before = base.detach().clone()
    merged = lora.Weight(name="w", base=base, down=down, up=up, scaling=0.5).merged()
    exact = base.double() + 0.5 * up.double() @ down.double()
    assert merged.dtype is torch.bfloat16 and torch.equal(merged, exact.bfloat16())
    assert torch.equal(base, before)


def test_named_targets_alone_get_adapters(folder):
    model = load(folder, "llama")
    state = torch.get_rng_state()
    lora.add_adapters(model, LoraConfig(rank=2, target_modules="q_proj, down_proj"), seed=1)
    adapted = {weight.name.split(".")[-2] for weight in lora.named_weights(model) if weight.down is not None}
    assert adapted == {"q_proj", "down_proj"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chosen", ["q_prj", "q_proj,lm_head", "q_proj,", "embed_tokens", "self_attn"])
def test_unknown_targets_are_refused_in_one_line(chosen, folder):
    with pytest.raises(ConfigError) as refused:
        lora.add_adapters(load(folder, "qwen2"), LoraConfig(rank=2, target_modules=chosen), seed=1)
    message = str(refused.value)
    assert f"model.lora.target_modules={chosen}: " in message and "\n" not in message
    assert message.endswith("down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj")
