"""Options of the policy's model, and of adapters on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.config.checks import at_least, positive, require
from rlver_dist.config.enums import Precision

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
        at_least(0, "model.lora.", rank=self.rank)
        positive("model.lora.", alpha=self.alpha)
        require(
            bool(self.target_modules),
            "model.lora.target_modules",
            "''",
            "use all-linear or names such as q_proj,v_proj",
        )

    def targets(self, there: set[str]) -> set[str]:
        """Which of the linear layers `there`, by the last part of their names, get an adapter.

        Raises:
            ConfigError: one that was named is none of them.
        """
        if self.target_modules == ALL_LINEAR:
            return there
        named = {name.strip() for name in self.target_modules.split(",")}
        for name in sorted(named - there):
            way_out = (
                f"the model has no linear layer '{name}' below its head; use {ALL_LINEAR} or names among "
                f"{','.join(sorted(there))}"
            )
            require(False, "model.lora.target_modules", self.target_modules, way_out)
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
        "needs, answer in a few "
        "plain, spoken sentences, speak to what they have told you, and never lecture."
    )
    """The policy's system message in training and evaluation."""
    think_instruction: str = (
        "Before each reply, work out between <think> and </think> what the other person feels, what they "
        "want from this talk and how "
        "you will answer; they never see that part. After </think> write only the reply itself."
    )
    """Added to the system message where `rollout.think` is on."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of the whole policy."""

    def __post_init__(self) -> None:
        require(
            bool(self.path), "model.path", repr(self.path), "name a model folder, a hub id or a bundled model"
        )
        at_least(256, "model.", max_context_tokens=self.max_context_tokens)
