"""Options of what learns: policy learner, critic, and the format warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.enums import CriticTrunk
from rlver_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    """The DeepSpeed policy learner."""

    lr: float = 1e-6
    """AdamW's learning rate after warm-up (RLVER, appendix B.4)."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up, constant afterwards (train_rlver.sh: ratio 0.02 of 1000)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be left out because their gradient is not finite; one more ends the
    run."""
    micro_batch_tokens: int = 16384
    """Tokens of one packed row, the unit of one forward and backward pass."""
    share_prefixes: bool = True
    """Compute a history that several turns of a dialogue share once, where that takes fewer tokens; exact
    either way."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3 (bfloat16 needs 1 or more)."""
    offload_optimizer: bool = False
    """Keep optimizer state and step in host memory (ZeRO 1 to 3): slower, saves 12 bytes of GPU memory a
    parameter. With ZeRO 1 and 2 the gradients of a step's micro-batches are then summed in `model.dtype`
    instead of float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        check_learner(self, "learner.")


def check_learner(config: LearnerConfig, group: str) -> None:
    """Check the options that policy and critic share; `group` names the keys in errors.

    Raises:
        ConfigError: a value is refused.
    """
    if not config.lr > 0:
        raise ConfigError(f"{group}lr={config.lr}: use a number above 0")
    if not config.grad_clip > 0:
        raise ConfigError(f"{group}grad_clip={config.grad_clip}: use a number above 0")
    if config.max_skipped_steps < 0:
        raise ConfigError(f"{group}max_skipped_steps={config.max_skipped_steps}: use 0 or more")
    if config.warmup_steps < 0:
        raise ConfigError(f"{group}warmup_steps={config.warmup_steps}: use 0 or more")
    if not config.weight_decay >= 0:
        raise ConfigError(f"{group}weight_decay={config.weight_decay}: use 0 or more")
    if not 0 <= config.beta1 < 1:
        raise ConfigError(f"{group}beta1={config.beta1}: use a value from 0 to below 1")
    if not 0 <= config.beta2 < 1:
        raise ConfigError(f"{group}beta2={config.beta2}: use a value from 0 to below 1")
    if config.micro_batch_tokens < 128:
        raise ConfigError(f"{group}micro_batch_tokens={config.micro_batch_tokens}: use 128 or more")
    if config.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"{group}zero_stage={config.zero_stage}: use 0, 1, 2 or 3")
    # DeepSpeed offloads the optimizer as a part of ZeRO.
    if config.offload_optimizer and config.zero_stage == 0:
        raise ConfigError(
            f"{group}offload_optimizer={config.offload_optimizer}: use {group}zero_stage of 1 or more with it"
        )


@dataclass(kw_only=True, slots=True)
class CriticConfig(LearnerConfig):
    """PPO's critic, a DeepSpeed learner of its own with the policy learner's options and some more; unused by
    GRPO."""

    lr: float = 5e-6
    """AdamW's learning rate after warm-up (RLVER, train_rlver.sh)."""
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up (train_rlver.sh: ratio 0.05 of 1000)."""
    trunk: CriticTrunk = CriticTrunk.trained
    """Whether the model under the value head learns: `trained`, or `frozen`, which keeps the base model and
    trains the head alone; gradient_checkpointing then has no effect."""
    num_layers: int = 0
    """Layers of the model that the critic keeps, from the first on; 0 keeps all."""
    head_units: int = 0
    """Hidden units of the value head; 0 makes it linear."""
    epochs: int = 1
    """Passes over an iteration's samples (the original's: 1)."""
    value_clip: float = 0.5
    """Furthest that a value moves from its old one before the loss stops following it, in reward
    (train_rlver.sh: 0.5); 0 never."""
    pretrain_iterations: int = 0
    """First iterations that train the critic alone, before its advantages move the policy."""

    def __post_init__(self) -> None:
        check_learner(self, "critic.")
        if self.num_layers < 0:
            raise ConfigError(f"critic.num_layers={self.num_layers}: use 0 or more")
        if self.head_units < 0:
            raise ConfigError(f"critic.head_units={self.head_units}: use 0 or more")
        if not self.value_clip >= 0:
            raise ConfigError(f"critic.value_clip={self.value_clip}: use 0 or more")
        if self.pretrain_iterations < 0:
            raise ConfigError(f"critic.pretrain_iterations={self.pretrain_iterations}: use 0 or more")
        if self.epochs < 1:
            raise ConfigError(f"critic.epochs={self.epochs}: use 1 or more")


def check_num_layers(kept: int, available: int) -> None:
    """Check `critic.num_layers` (`kept`) against the layers that the model has.

    Raises:
        ConfigError: the model has fewer.
    """
    if kept > available:
        raise ConfigError(
            f"critic.num_layers={kept}: the model has {available} layers; use at most that, or 0 for all"
        )


@dataclass(kw_only=True, slots=True)
class WarmUpConfig:
    """Supervised warm-up before reinforcement learning: teaches a model that cannot follow the think format
    that format, on its own thoughts, and to reply behind them as it did without (`learner/imitation.py`).
    Runs where `rollout.think` is on."""

    dialogues: int = 0
    """Dialogues with training personas whose replies are learned from; 0 leaves the stage out."""
    max_turns: int = 2
    """Replies of each; later ones than these are not taught, and lose the format more often
    (docs/results)."""
    max_thought_tokens: int = 24
    """Tokens of a thought."""
    epochs: int = 1
    """Passes over the replies."""
    batch_size: int = 16
    """Replies an optimizer step, on average: the replies of a dialogue stay together, so a step takes one
    dialogue at least."""
    lr: float = 5e-5
    """AdamW's learning rate at first; it falls to 0 over the stage. Reinforcement learning starts with a
    fresh optimizer."""

    def __post_init__(self) -> None:
        if self.dialogues < 0:
            raise ConfigError(f"warm_up.dialogues={self.dialogues}: use 0 or more")
        if self.max_turns < 1:
            raise ConfigError(f"warm_up.max_turns={self.max_turns}: use 1 or more")
        if self.max_thought_tokens < 1:
            raise ConfigError(f"warm_up.max_thought_tokens={self.max_thought_tokens}: use 1 or more")
        if self.epochs < 1:
            raise ConfigError(f"warm_up.epochs={self.epochs}: use 1 or more")
        if self.batch_size < 1:
            raise ConfigError(f"warm_up.batch_size={self.batch_size}: use 1 or more")
        if not self.lr > 0:
            raise ConfigError(f"warm_up.lr={self.lr}: use a number above 0")
