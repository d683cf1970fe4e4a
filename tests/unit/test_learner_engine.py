"""What DeepSpeed is asked for, and how the learning rate goes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from rlver_dist.config.enums import Precision
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.learner.engine import TrainingEngine, deepspeed_config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_summed_in_float32_and_not_averaged_over_micro_batches(stage):
    settings = deepspeed_config(LearnerConfig(zero_stage=stage), Precision.bfloat16)
    assert settings["bf16"] == {"enabled": True} and settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["managed_gradient_accumulation"] is False and settings["gradient_accumulation_steps"] == 1
    assert settings["zero_optimization"]["stage"] == stage


class StandInEngine:
    """Stands where DeepSpeed's engine stands: steps optimizer and schedule, without a gradient."""

    def __init__(self, *, model, optimizer, lr_scheduler, config) -> None:
        self.module, self.optimizer, self.lr_scheduler = model, optimizer, lr_scheduler

    def step(self) -> None:
        self.optimizer.step()
        self.lr_scheduler.step()

    def get_global_grad_norm(self) -> float:
        return 0.0


def learning_rates(monkeypatch, num_steps: int, warmup_steps: int, decay_steps: int | None) -> list[float]:
    """The learning rate of each optimizer step, where the configured one is 1."""
    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(initialize=lambda **parts: (StandInEngine(**parts),))
    )
    config = LearnerConfig(lr=1.0, warmup_steps=warmup_steps, zero_stage=1)
    engine = TrainingEngine(
        torch.nn.Linear(1, 1), config=config, settings={}, world_size=1, decay_steps=decay_steps
    )
    rates = []
    for _ in range(num_steps):
        rates.append(engine.lr)
        engine.step()
    return rates


def test_the_learning_rate_rises_and_stays(monkeypatch):
    assert learning_rates(monkeypatch, 6, 4, None) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_of_a_stage_falls_to_0(monkeypatch):
    assert learning_rates(monkeypatch, 5, 1, 4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rates(monkeypatch, 5, 2, 4) == [0.5, 0.75, 0.5, 0.25, 0.0]
