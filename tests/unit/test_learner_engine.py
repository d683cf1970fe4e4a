"""What DeepSpeed is asked for, and how the learning rate goes."""

import pytest

from rlver_dist.config.enums import Precision
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.learner.engine import _lr_factor, deepspeed_config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_summed_in_float32_and_not_averaged_over_micro_batches(stage):
    settings = deepspeed_config(LearnerConfig(zero_stage=stage), Precision.bfloat16)
    assert settings["bf16"] == {"enabled": True} and settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["managed_gradient_accumulation"] is False and settings["gradient_accumulation_steps"] == 1
    assert settings["zero_optimization"]["stage"] == stage


def test_the_learning_rate_rises_and_stays():
    assert [_lr_factor(step, 4, None) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_of_a_stage_falls_to_0():
    assert [_lr_factor(step, 1, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [_lr_factor(step, 2, 4) for step in range(5)] == [0.5, 0.75, 0.5, 0.25, 0.0]
