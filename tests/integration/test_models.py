"""Each architecture that preflight lets through trains exactly.

A random model of it makes one iteration, whose syncs compare the learner's log-probs with the engine's.
"""

import pytest
import torch
import transformers

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.preflight.model_folder import TRAINABLE
from rlver_dist.tracking.jsonl import read_metrics
from tests.integration.launched import launching

pytestmark = pytest.mark.slow
SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=4096,
)
ELSEWHERE = {"Qwen2ForCausalLM"}
"""`tiny-random` is one, with which most other tests run."""


def save_model(architecture: str, folder) -> None:
    """A random model of the architecture with SmolLM2's tokenizer."""
    model = getattr(transformers, architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve(SMOLLM2))
    options = {"sliding_window": None} if architecture.startswith("Mistral") else {}
    torch.manual_seed(0)
    config = model.config_class(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SHAPE, **options
    )
    model(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", sorted(set(TRAINABLE) - ELSEWHERE))
def test_an_architecture_trains_as_it_samples(tmp_path, architecture):
    save_model(architecture, tmp_path / "model")
    with launching() as launch:
        overrides = (f"model.path={tmp_path / 'model'}", "num_iterations=1", "evaluation.num_personas=0")
        done = launch(tmp_path / "run", *overrides).finish()
    assert done.code == 0, done.output
    [metrics] = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics["sync/probe_mean_abs"] < 1e-5 and metrics["learner/optimizer_steps"] > 0
