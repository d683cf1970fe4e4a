"""Options of what learns and how: model, algorithm, policy learner, critic, warm-up. `config.py` holds the rest and the whole run."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.choices import AlgorithmName, CriticTrunk, EndReward, KLEstimator, KLPlacement, Precision, RewardPlacement
from rlver_dist.errors import ConfigError
from rlver_dist.guards_config import GuardsConfig

ALL_LINEAR = "all-linear"


def require(holds: bool, key: str, value: object, way_out: str) -> None:
    """Raise `ConfigError` naming `key`, `value` and the way out unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}={value}: {way_out}")


def at_least(minimum: float, group: str, **values: float) -> None:
    """Raise `ConfigError` for the first of `values` below `minimum`."""
    for key, value in values.items():
        require(value >= minimum, f"{group}{key}", value, f"use {minimum:g} or more")


def positive(group: str, **values: float) -> None:
    """Raise `ConfigError` for the first of `values` that is not above 0."""
    for key, value in values.items():
        require(value > 0, f"{group}{key}", value, "use a number above 0")


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters instead of full training (LoRA, arXiv:2106.09685); merged wherever the policy leaves the learner."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    target_modules: str = ALL_LINEAR
    """Which linear layers get one: `all-linear` (all but the head), or comma-separated names such as `q_proj,v_proj`."""

    def __post_init__(self) -> None:
        at_least(0, "model.lora.", rank=self.rank)
        positive("model.lora.", alpha=self.alpha)
        require(bool(self.target_modules), "model.lora.target_modules", "''", "use all-linear or names such as q_proj,v_proj")

    def targets(self, there: set[str]) -> set[str]:
        """Which of the linear layers `there`, by the last part of their names, get an adapter.

        Raises:
            ConfigError: one that was named is none of them.
        """
        if self.target_modules == ALL_LINEAR:
            return there
        named = {name.strip() for name in self.target_modules.split(",")}
        for name in sorted(named - there):
            way_out = f"the model has no linear layer '{name}' below its head; use {ALL_LINEAR} or names among {','.join(sorted(there))}"
            require(False, "model.lora.target_modules", self.target_modules, way_out)
        return named


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy model."""

    path: str = "Qwen/Qwen2.5-7B-Instruct"
    """A Hugging Face folder or hub id, or a bundled name: `smollm2-135m-instruct`, `tiny-random` (see `models.py`)."""
    dtype: Precision = Precision.auto
    """Weights' format in learner and engines: `float32`, `bfloat16`, or `auto`, which is bfloat16 except on CPUs without instructions
    for it. The optimizer always keeps float32 master weights."""
    max_context_tokens: int = 16384
    """Longest dialogue in tokens, prompt and reply together; beyond it a dialogue ends as `context_overflow`."""
    system_prompt: str = (
        "You are a close friend with a fine sense for feelings. Listen to what the other person really needs, answer in a few "
        "plain, spoken sentences, speak to what they have told you, and never lecture."
    )
    """The policy's system message in training and evaluation."""
    think_instruction: str = (
        "Before each reply, work out between <think> and </think> what the other person feels, what they want from this talk and how "
        "you will answer; they never see that part. After </think> write only the reply itself."
    )
    """Added to the system message where `rollout.think` is on."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train adapters instead of the whole policy."""

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", repr(self.path), "name a model folder, a hub id or a bundled model")
        at_least(256, "model.", max_context_tokens=self.max_context_tokens)


@dataclass(kw_only=True, slots=True)
class EndRewardConfig:
    """The rule for each end that the policy causes. All other ends are paid final emotion / 100."""

    malformed: EndReward = EndReward.zero
    """A broken format or no text for the user (RLVER, section 2.3: reward 0; the original's code takes nothing off, `emotion`)."""
    over_long: EndReward = EndReward.emotion
    """A reply that hit the token limit, where `rollout.end_on_truncation` is on."""
    context_overflow: EndReward = EndReward.emotion
    """The dialogue outgrew the model's context."""


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """From rewards to a loss."""

    name: AlgorithmName = AlgorithmName.grpo
    """Advantage estimator."""
    group_size: int = 4
    """Dialogues per persona and iteration, which GRPO compares with each other (RLVER, appendix B.4: 4 for GRPO, 1 for PPO)."""
    normalize_by_std: bool = True
    """Divide a group's centred rewards by their standard deviation + 1e-6 (GRPO, arXiv:2402.03300, section 4.1.2)."""
    gamma: float = 1.0
    """PPO: discount per trained token (the original's: 1)."""
    gae_lambda: float = 1.0
    """PPO: lambda of generalised advantage estimation (arXiv:1506.02438; the original's: 1)."""
    reward_placement: RewardPlacement = RewardPlacement.end
    """Pay the reward at a dialogue's `end` (RLVER), or at each of its `turns` that turn's change of emotion / 100: their sum is the
    reward less the start, so at gamma 1 the same policies are best (potential-based shaping, Ng et al. 1999), but no reply answers for
    the turns before it. GRPO then compares turn with turn, by what is still to come, instead of dialogue with dialogue."""
    whiten_advantages: bool = True
    """PPO: shift and scale the advantages of an iteration's trained tokens to mean 0 and deviation 1 (the original does)."""
    clip_low: float = 0.2
    """Lower clip range of the probability ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip range: 1 + clip_high."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight pi_learner_old / pi_rollout per token; 0 switches the correction off."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference); 0 builds no reference model (the original's value)."""
    kl_target: float = 0.0
    """KL in nats a token that the weight is adapted to (arXiv:1909.08593, section 2.2), starting from kl_coef; 0 keeps it fixed."""
    kl_horizon: float = 10000.0
    """Dialogues over which an adapted weight can change by its largest step, 20 %."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Which estimator of the KL."""
    kl_placement: KLPlacement = KLPlacement.loss
    """Where the KL enters."""
    entropy_coef: float = 0.001
    """Weight of the policy's token entropy, added to the objective (RLVER, train_rlver.sh)."""
    updates_per_iteration: int = 1
    """Optimizer steps that one iteration's dialogues are split into, thinking or not. The original's no-think recipes make 1; its think
    recipes make about 8, since it cuts by turns: use one number to compare the two."""
    end_rewards: EndRewardConfig = field(default_factory=EndRewardConfig)
    """Rewards of dialogues that the policy ended."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """What suspicious replies lose; nothing by default."""

    def __post_init__(self) -> None:
        at_least(2 if self.name is AlgorithmName.grpo else 1, "algorithm.", group_size=self.group_size)
        for key in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, key) <= 1, f"algorithm.{key}", getattr(self, key), "use a value from 0 to 1")
        positive("algorithm.", clip_low=self.clip_low, clip_high=self.clip_high)
        require(self.clip_low < 1, "algorithm.clip_low", self.clip_low, "use a value below 1")
        at_least(0, "algorithm.", tis_cap=self.tis_cap, kl_coef=self.kl_coef, entropy_coef=self.entropy_coef, kl_target=self.kl_target)
        positive("algorithm.", kl_horizon=self.kl_horizon)
        pulls = self.kl_coef == 0 or self.kl_placement is KLPlacement.reward or self.kl_estimator is not KLEstimator.k1
        require(pulls, "algorithm.kl_estimator", "k1", "its gradient is 0 on average; use k2 or k3, or algorithm.kl_placement=reward")
        adapts = self.kl_target == 0 or self.kl_coef > 0
        require(adapts, "algorithm.kl_target", self.kl_target, "use algorithm.kl_coef above 0 to start from, or kl_target=0")
        at_least(1, "algorithm.", updates_per_iteration=self.updates_per_iteration)


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
    micro_batch_tokens: int = 16384
    """Tokens of one packed row, the unit of one forward and backward pass."""
    share_prefixes: bool = True
    """Compute a history that several turns of a dialogue share once, where that takes fewer tokens; exact either way."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3 (bfloat16 needs 1 or more)."""
    offload_optimizer: bool = False
    """Keep optimizer state and step in host memory (ZeRO 1 to 3): slower, saves 12 bytes of GPU memory a parameter. With ZeRO 1 and 2 the
    gradients of a step's micro-batches are then summed in `model.dtype` instead of float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        check_learner(self, "learner.")


def check_learner(config: LearnerConfig, group: str) -> None:
    """Check the options that policy and critic share; `group` names the keys in errors."""
    positive(group, lr=config.lr, grad_clip=config.grad_clip)
    at_least(0, group, warmup_steps=config.warmup_steps, weight_decay=config.weight_decay)
    for key in ("beta1", "beta2"):
        require(0 <= getattr(config, key) < 1, f"{group}{key}", getattr(config, key), "use a value from 0 to below 1")
    at_least(128, group, micro_batch_tokens=config.micro_batch_tokens)
    require(config.zero_stage in (0, 1, 2, 3), f"{group}zero_stage", config.zero_stage, "use 0, 1, 2 or 3")
    sharded = config.zero_stage > 0 or not config.offload_optimizer
    require(sharded, f"{group}offload_optimizer", config.offload_optimizer, f"use {group}zero_stage of 1 or more with it")


@dataclass(kw_only=True, slots=True)
class CriticConfig(LearnerConfig):
    """PPO's critic, a DeepSpeed learner of its own with the policy learner's options and some more; unused by GRPO."""

    lr: float = 5e-6
    """AdamW's learning rate after warm-up (RLVER, train_rlver.sh)."""
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up (train_rlver.sh: ratio 0.05 of 1000)."""
    trunk: CriticTrunk = CriticTrunk.trained
    """Whether the model under the value head learns: `trained`, or `frozen` as it came, which leaves the head alone to learn;
    gradient_checkpointing then has no effect."""
    num_layers: int = 0
    """Layers of the model that the critic keeps, from the first on; 0 keeps all."""
    head_units: int = 0
    """Hidden units of the value head; 0 makes it linear."""
    epochs: int = 1
    """Passes over an iteration's samples (the original's: 1)."""
    value_clip: float = 0.5
    """Furthest that a value moves from its old one before the loss stops following it, in reward (train_rlver.sh: 0.5); 0 never."""
    prefit_iterations: int = 0
    """First iterations that train the critic alone, before its advantages move the policy."""

    def __post_init__(self) -> None:
        check_learner(self, "critic.")
        at_least(0, "critic.", num_layers=self.num_layers, head_units=self.head_units, value_clip=self.value_clip)
        at_least(0, "critic.", prefit_iterations=self.prefit_iterations)
        at_least(1, "critic.", epochs=self.epochs)


def check_num_layers(kept: int, there: int) -> None:
    """Raise `ConfigError` where `critic.num_layers` (`kept`) is more than the model has."""
    require(kept <= there, "critic.num_layers", kept, f"the model has {there} layers; use at most that, or 0 for all")


@dataclass(kw_only=True, slots=True)
class WarmUpConfig:
    """Supervised warm-up before reinforcement learning: teaches a model that cannot follow the think format that format, on its own
    thoughts, and to reply behind them as it did without (`learner/imitation.py`). Runs where `rollout.think` is on."""

    dialogues: int = 0
    """Dialogues with training personas whose replies are learned from; 0 leaves the stage out."""
    max_turns: int = 2
    """Replies of each; later ones than these are not taught, and lose the format more often (docs/results)."""
    max_thought_tokens: int = 24
    """Tokens of a thought."""
    epochs: int = 1
    """Passes over the replies."""
    batch_size: int = 16
    """Replies an optimizer step, on average: the replies of a dialogue stay together, so a step takes one dialogue at least."""
    lr: float = 5e-5
    """AdamW's learning rate at first; it falls to 0 over the stage. Reinforcement learning starts with a fresh optimizer."""

    def __post_init__(self) -> None:
        at_least(0, "warm_up.", dialogues=self.dialogues)
        at_least(1, "warm_up.", max_turns=self.max_turns, max_thought_tokens=self.max_thought_tokens, epochs=self.epochs)
        at_least(1, "warm_up.", batch_size=self.batch_size)
        positive("warm_up.", lr=self.lr)
