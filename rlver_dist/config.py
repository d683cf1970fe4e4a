"""Every option of a run: name, unit, default, meaning and check.

The YAML files under `conf/` hold only differences from the defaults here. `launch.py` composes them and calls `OmegaConf.to_object`
once, which runs the checks in `__post_init__`; after that a configuration never changes. `slots=True` refuses a misspelt key.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.choices import AlgorithmName, Device, EndReward, KLEstimator, KLPlacement, Precision, Preset, WandbMode
from rlver_dist.errors import ConfigError


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
class ModelConfig:
    """The policy model."""

    path: str = "Qwen/Qwen2.5-7B-Instruct"
    """A Hugging Face folder or hub id, or a bundled name: `smollm2-135m-instruct`, `tiny-random` (see `models.py`)."""
    dtype: Precision = Precision.bfloat16
    """Weights' format in learner and engines; the optimizer always keeps float32 master weights."""
    max_context_tokens: int = 16384
    """Longest dialogue in tokens, prompt and reply together; beyond it a dialogue ends as `context_overflow`."""
    system_prompt: str = (
        "You are a close friend with a fine sense for feelings. Listen to what the other person really needs, answer in a few "
        "plain, spoken sentences, speak to what they have told you, and never lecture."
    )
    """The policy's system message in training and evaluation."""

    def __post_init__(self) -> None:
        require(bool(self.path), "model.path", repr(self.path), "name a model folder, a hub id or a bundled model")
        at_least(256, "model.", max_context_tokens=self.max_context_tokens)


@dataclass(kw_only=True, slots=True)
class EndRewardConfig:
    """The rule for each end that the policy causes. All other ends are paid final emotion / 100."""

    malformed: EndReward = EndReward.zero
    """No text for the user (RLVER, section 2.3: reward 0 for a broken format)."""
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
    """Dialogues per persona and iteration that are compared with each other (RLVER, appendix B.4: 4)."""
    normalize_by_std: bool = True
    """Divide a group's centred rewards by their standard deviation + 1e-6 (GRPO, arXiv:2402.03300, section 4.1.2)."""
    clip_low: float = 0.2
    """Lower clip range of the probability ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip range: 1 + clip_high."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight pi_learner_old / pi_rollout per token; 0 switches the correction off."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference); 0 builds no reference model (the original's value)."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Which estimator of the KL."""
    kl_placement: KLPlacement = KLPlacement.loss
    """Where the KL enters."""
    entropy_coef: float = 0.001
    """Weight of the policy's token entropy, added to the objective (RLVER, train_rlver.sh)."""
    updates_per_iteration: int = 1
    """Optimizer steps that one iteration's dialogues are split into (the original's no-think recipes make 1)."""
    end_rewards: EndRewardConfig = field(default_factory=EndRewardConfig)
    """Rewards of dialogues that the policy ended."""

    def __post_init__(self) -> None:
        at_least(2, "algorithm.", group_size=self.group_size)
        positive("algorithm.", clip_low=self.clip_low, clip_high=self.clip_high)
        require(self.clip_low < 1, "algorithm.clip_low", self.clip_low, "use a value below 1")
        at_least(0, "algorithm.", tis_cap=self.tis_cap, kl_coef=self.kl_coef, entropy_coef=self.entropy_coef)
        at_least(1, "algorithm.", updates_per_iteration=self.updates_per_iteration)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Who the simulated users are."""

    train: str = "bank"
    """Training personas: `bank` (shipped with the package) or a JSONL file, in this project's or RLVER's format."""
    evaluation: str = "bank"
    """Evaluation personas, likewise."""


@dataclass(kw_only=True, slots=True)
class SimulatorConfig:
    """The simulated users and the reward service in front of them."""

    preset: Preset = Preset.rlver_vanilla
    """Emotion rules in training; evaluation always uses `sage`."""
    start_emotion: float | None = None
    """Emotion at the opening in points; null takes the preset's."""
    max_change: float | None = None
    """Largest change a turn in points, either way; null takes the preset's."""
    acceptance: float | None = None
    """Difficulty, 0 to 1: share of a reply's merit that the user lets count; null takes the preset's."""
    expressiveness: float | None = None
    """Difficulty, 0 to 1: how readily user messages show feelings and needs; null takes the preset's."""
    replicas: int = 1
    """Reward service actors."""

    def __post_init__(self) -> None:
        for key, top in {"start_emotion": 100, "acceptance": 1, "expressiveness": 1}.items():
            value = getattr(self, key)
            require(value is None or 0 <= value <= top, f"simulator.{key}", value, f"use null or a value from 0 to {top}")
        change = self.max_change
        require(change is None or 0 < change <= 100, "simulator.max_change", change, "use null or a value above 0, up to 100")
        at_least(1, "simulator.", replicas=self.replicas)


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Collecting dialogues."""

    batch_size: int = 32
    """Personas per iteration; each is talked to `algorithm.group_size` times (RLVER, train_rlver.sh: 32)."""
    max_turns: int = 8
    """Replies a dialogue (RLVER, appendix B.3)."""
    max_reply_tokens: int = 1024
    """Tokens a reply; a reply that hits it is `truncated`."""
    end_on_truncation: bool = False
    """End a dialogue as `over_long` at a truncated reply; else the user hears the cut reply and takes it as it is."""
    temperature: float = 1.0
    """Sampling temperature in training (RLVER, appendix B.3); top_p is 1 and top_k off, so that log-probs are exact."""
    max_concurrent: int = 256
    """Dialogues in flight."""
    request_timeout_s: float = 600.0
    """Seconds after which one reply or one appraisal counts as an infrastructure failure."""

    def __post_init__(self) -> None:
        at_least(1, "rollout.", batch_size=self.batch_size, max_turns=self.max_turns, max_reply_tokens=self.max_reply_tokens)
        at_least(1, "rollout.", max_concurrent=self.max_concurrent)
        positive("rollout.", temperature=self.temperature, request_timeout_s=self.request_timeout_s)


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
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3 (bfloat16 needs 1 or more)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        positive("learner.", lr=self.lr, grad_clip=self.grad_clip)
        at_least(0, "learner.", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"learner.{key}", getattr(self, key), "use a value from 0 to below 1")
        at_least(128, "learner.", micro_batch_tokens=self.micro_batch_tokens)
        require(self.zero_stage in (0, 1, 2, 3), "learner.zero_stage", self.zero_stage, "use 0, 1, 2 or 3")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where things run."""

    device: Device = Device.auto
    """What engines and learners compute on."""
    address: str | None = None
    """Ray cluster to join; null joins the one in RAY_ADDRESS, else starts one on this machine."""
    engines: int = 0
    """vLLM engines for the policy; 0 derives engines and ranks from the GPUs that Ray sees."""
    tensor_parallel: int = 1
    """GPUs an engine."""
    learner_ranks: int = 0
    """Data-parallel ranks of the learner; 0 derives them."""
    gpus_per_engine_rank: float = 1.0
    """GPUs that Ray reserves for each engine worker; below 1 lets an engine and a learner share one."""
    gpus_per_learner_rank: float = 1.0
    """GPUs that Ray reserves for each learner rank."""
    gpu_memory_fraction: float = 0.85
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gib: int = 2
    """On CPUs: memory of an engine's key-value cache, GiB."""
    cpu_threads: int = 0
    """On CPUs: threads of each engine and learner rank, which work in turn and share the cores; 0 takes all cores."""
    dashboard: bool = True
    """Serve the Ray dashboard on loopback where the run starts Ray itself."""

    def __post_init__(self) -> None:
        at_least(0, "cluster.", engines=self.engines, learner_ranks=self.learner_ranks, cpu_threads=self.cpu_threads)
        at_least(1, "cluster.", tensor_parallel=self.tensor_parallel, kv_cache_gib=self.kv_cache_gib)
        for key in ("gpus_per_engine_rank", "gpus_per_learner_rank", "gpu_memory_fraction"):
            require(0 < getattr(self, key) <= 1, f"cluster.{key}", getattr(self, key), "use a share above 0, up to 1")
        paired = (self.engines == 0) == (self.learner_ranks == 0)
        require(paired, "cluster.learner_ranks", self.learner_ranks, "set both cluster.engines and cluster.learner_ranks, or neither")


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out dialogues before and after training."""

    num_personas: int = 100
    """Evaluation personas, the first so many of the file; 0 switches evaluation off."""
    max_turns: int = 8
    """Replies a dialogue."""
    temperature: float = 1.0
    """Sampling temperature; seeds are fixed, so that before and after differ by the weights alone."""
    bootstrap_samples: int = 10000
    """Resamples of the paired bootstrap interval."""

    def __post_init__(self) -> None:
        at_least(0, "evaluation.", num_personas=self.num_personas)
        at_least(1, "evaluation.", max_turns=self.max_turns)
        positive("evaluation.", temperature=self.temperature)
        at_least(100, "evaluation.", bootstrap_samples=self.bootstrap_samples)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """What is written down."""

    wandb: WandbMode = WandbMode.auto
    """Weights & Biases; `metrics.jsonl` and the Parquet ledger are always written."""
    project: str = "rlver_dist"
    """W&B project."""
    name: str = ""
    """W&B run name; empty takes the output folder's name."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A whole run; its fields are the groups of `conf/`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    data: DataConfig = field(default_factory=DataConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    num_iterations: int = 1000
    """Iterations of collect, update, sync (train_rlver.sh: 1000 steps)."""
    save_every: int = 5
    """Iterations between checkpoints (train_rlver.sh: 5); 0 saves only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    resume: str = "auto"
    """`auto` goes on from the newest complete checkpoint in `output_dir`, `never` refuses a folder that has one, or a checkpoint's path."""
    seed: int = 1
    """Seeds personas, users, sampling and initialisation."""
    output_dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"
    """Where the run writes."""
    check: bool = False
    """Compose, validate, print the resolved arithmetic, and stop."""

    def __post_init__(self) -> None:
        at_least(1, "", num_iterations=self.num_iterations, keep_checkpoints=self.keep_checkpoints)
        at_least(0, "", save_every=self.save_every)
        updates, groups = self.algorithm.updates_per_iteration, self.rollout.batch_size
        require(updates <= groups, "algorithm.updates_per_iteration", updates, f"use at most rollout.batch_size={groups}, a group a step")
        reply, longest = self.rollout.max_reply_tokens, self.model.max_context_tokens
        require(reply < longest, "rollout.max_reply_tokens", reply, f"use less than model.max_context_tokens={longest}")
        exact = self.model.dtype is Precision.float32 or self.learner.zero_stage >= 1
        require(exact, "learner.zero_stage", self.learner.zero_stage, "use 1 or more with model.dtype=bfloat16, or model.dtype=float32")
