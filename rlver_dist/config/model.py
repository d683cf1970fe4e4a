"""Options of the policy's model, and of adapters on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.config.enums import Precision
from rlver_dist.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters instead of full training (LoRA, arXiv:2106.09685); merged wherever the policy leaves
    the learner."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    target_modules: str = ALL_LINEAR
    """Which linear layers get one: `all-linear` (all but the head), or comma-separated names such as
    `q_proj,v_proj`."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"model.lora.rank={self.rank}: use 0 or more")
        if not self.alpha > 0:
            raise ConfigError(f"model.lora.alpha={self.alpha}: use a number above 0")
        if not self.target_modules:
            raise ConfigError("model.lora.target_modules='': use all-linear or names such as q_proj,v_proj")

    def targets(self, available: set[str]) -> set[str]:
        """Which of the model's linear layers, `available` by the last part of their names, get an adapter.

        Raises:
            ConfigError: one that was named is none of them.
        """
        if self.target_modules == ALL_LINEAR:
            return available
        named = {name.strip() for name in self.target_modules.split(",")}
        # peft would leave a name that fits nothing out, and the run would train less than was asked for.
        for name in sorted(named - available):
            raise ConfigError(
                f"model.lora.target_modules={self.target_modules}: the model has no linear layer '{name}' "
                f"below its head; use {ALL_LINEAR} or names among {','.join(sorted(available))}"
            )
        return named


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy model."""

    path: str = "Qwen/Qwen2.5-7B-Instruct"
    """A Hugging Face folder or hub id, or a bundled name: `smollm2-135m-instruct`, `tiny-random` (see
    `bundled_models.py`)."""
    dtype: Precision = Precision.auto
    """Weights' format in learner and engines: `float32`, `bfloat16`, or `auto`, which is bfloat16 except on
    CPUs without instructions for it. The optimizer always keeps float32 master weights."""
    max_context_tokens: int = 16384
    """Longest dialogue in tokens, prompt and reply together; beyond it a dialogue ends as
    `context_overflow`."""
    system_prompt: str = (
        "You are a close friend with a fine sense for feelings. Listen to what the other person really "
        "needs, answer in a few plain, spoken sentences, speak to what they have told you, and never lecture."
    )
    """The policy's system message in training and evaluation."""
    think_instruction: str = (
        "Before each reply, work out between <think> and </think> what the other person feels, what they "
        "want from this talk and how you will answer; they never see that part. After </think> write only "
        "the reply itself."
    )
    """Added to the system message where `rollout.think` is on."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of the whole policy."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model.path='': name a model folder, a hub id or a bundled model")
        if self.max_context_tokens < 256:
            raise ConfigError(f"model.max_context_tokens={self.max_context_tokens}: use 256 or more")
