"""What the tests of policy, critic and LoRA learners share: a small model, samples, learners on a rank, and
the comparison of weights.

Learners run in spawned processes, one a rank (`ranks.py`), since DeepSpeed keeps process-wide state; all
one-rank scenarios of a file share a process. The fixtures `one` and `two` start them (`conftest.py`).
"""

from functools import partial

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlver_dist.bundled_models import TINY, resolve
from rlver_dist.experience.samples import TurnSample
from rlver_dist.tracking.metrics import reduce_metrics
from tests.integration.ranks import SETTINGS, start_critic, start_policy

VOCABULARY = 400
SHAPE = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
PROBE = [1, 345, 67, 42, 7, 11]
"""Tokens whose log-probs are compared."""
CUTS = {
    **SETTINGS,
    "unshared": dict(share_prefixes=False),
    "many_micro_batches": dict(micro_batch_tokens=128),
}
"""Ways of training that change nothing but the cost, by name."""


def save_model(folder, family="qwen2", *, tied=True):
    """A random model small enough that float32 sums over all its weights keep five digits; its tokenizer is
    only for the export."""
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    options = dict(
        vocab_size=VOCABULARY, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=tied
    )
    model(config(**options, **SHAPE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(TINY)).save_pretrained(folder)


def turn_sample(token_ids, loss_mask, trained_logprobs, *, dialogue, group, turn=0):
    """A row of a dialogue; `trained_logprobs` are those of its trained tokens, in their order."""
    logprobs = iter(trained_logprobs)
    return TurnSample(
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=[next(logprobs) if trained else 0.0 for trained in loss_mask],
        dialogue_id=str(dialogue),
        group_id=str(group),
        turn_index=turn,
    )


def draw_columns(draw, samples, low, high):
    """A number for each trained token of each sample."""
    return [torch.tensor([draw.uniform(low, high) for _ in range(sample.num_trained)]) for sample in samples]


def policy_builder(rank, world_size, port):
    """Makes policy learners of this rank from their configuration."""
    return partial(start_policy, rank=rank, world_size=world_size, port=port)


def critic_builder(rank, world_size, port):
    """Makes critic learners of this rank from their configuration."""
    return partial(start_critic, rank=rank, world_size=world_size, port=port)


def resume(build, config, directory, learn):
    """What two learners make of their second iteration, one of which was loaded from the other's checkpoint;
    the learners."""
    learners = [build(config), build(config)]
    learn(learners[0])
    learners[0].save(directory)
    learners[1].load(directory)
    return [learn(learner) for learner in learners], learners


def resume_job(config, directory, learn):
    """`resume` as a job of `run_jobs`."""
    return config, lambda build, config: resume(build, config, directory, learn)[0]


def movement(weights, start):
    """How far each tensor has moved from `start`."""
    return {name: tensor - start[name] for name, tensor in weights.items()}


def relative_error(weights, expected):
    """Norm of the difference over the norm of the expected tensors, all tensors as one vector."""
    assert weights.keys() == expected.keys()
    squares = [
        ((weights[name] - tensor).square().sum(), tensor.square().sum()) for name, tensor in expected.items()
    ]
    difference, size = (float(sum(parts)) ** 0.5 for parts in zip(*squares, strict=True))
    return difference / size


def grad_norms(metrics, learner):
    """Mean norm of each iteration's gradients before clipping; `learner` is how its metrics begin."""
    return [reduce_metrics(records)[f"{learner}/grad_norm"] for records in metrics]
