"""Every option of a run: name, unit, default, meaning and check.

The YAML files under `conf/` hold only differences from the defaults here. `launch.py` composes them and calls `OmegaConf.to_object`
once, which runs the checks in `__post_init__`; after that a configuration never changes. `slots=True` refuses a misspelt key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter

from rlver_dist.choices import AlgorithmName, CriticTrunk, Device, Precision, SecondJudge, SimulatorBackend, WandbMode
from rlver_dist.simulator_config import SimulatorConfig
from rlver_dist.training_config import (
    AlgorithmConfig,
    CriticConfig,
    LearnerConfig,
    ModelConfig,
    WarmUpConfig,
    at_least,
    positive,
    require,
)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Who the simulated users are."""

    train: str = "bank"
    """Training personas: `bank` (shipped with the package) or a JSONL file, in this project's or RLVER's format."""
    evaluation: str = "bank"
    """Evaluation personas, likewise."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Collecting dialogues."""

    dialogues_per_iteration: int = 128
    """Dialogues an iteration; divided by `algorithm.group_size` it gives the personas (RLVER, train_rlver.sh: 32 personas)."""
    think: bool = False
    """Ask for `<think>...</think>` before each reply; what is thought enters neither the history nor the user's ears."""
    max_turns: int = 8
    """Replies a dialogue (RLVER, appendix B.3)."""
    max_reply_tokens: int = 1024
    """Tokens a reply; a reply that hits the limit is `truncated`."""
    max_thinking_tokens: int = 1024
    """Tokens that `think` adds to that limit; thinking and reply share the sum."""
    end_on_truncation: bool = False
    """End a dialogue as `over_long` at a truncated reply; else the user hears the cut reply and takes it as it is."""
    temperature: float = 1.0
    """Sampling temperature in training (RLVER, appendix B.3); top_p is 1 and top_k off, so that log-probs are exact."""
    max_concurrent: int = 256
    """Dialogues in flight."""
    request_timeout_s: float = 600.0
    """Seconds after which one reply or one appraisal counts as an infrastructure failure."""

    def __post_init__(self) -> None:
        at_least(1, "rollout.", dialogues_per_iteration=self.dialogues_per_iteration, max_turns=self.max_turns)
        at_least(1, "rollout.", max_reply_tokens=self.max_reply_tokens, max_thinking_tokens=self.max_thinking_tokens)
        at_least(1, "rollout.", max_concurrent=self.max_concurrent)
        positive("rollout.", temperature=self.temperature, request_timeout_s=self.request_timeout_s)

    @property
    def max_turn_tokens(self) -> int:
        """Tokens that the policy may sample a turn, thinking included."""
        return self.max_reply_tokens + (self.max_thinking_tokens if self.think else 0)


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where things run."""

    device: Device = Device.auto
    """What engines and learners compute on."""
    address: str | None = None
    """Ray cluster to join; null joins the one in RAY_ADDRESS, else starts one on this machine."""
    engines: int = 0
    """vLLM engines for the policy; 0 derives engines, ranks and their shares of the GPUs that Ray sees: the three options on shares and
    memory below are then not used."""
    tensor_parallel: int = 1
    """GPUs an engine."""
    learner_ranks: int = 0
    """Data-parallel ranks of the learners; 0 derives them. With PPO half of them, rounded down, train the critic; a single one's share
    of a GPU is halved between policy and critic."""
    gpus_per_engine_rank: float = 1.0
    """GPUs that Ray reserves for each engine worker; below 1 lets an engine and a learner share one, on one node. With tensor_parallel
    above 1 it has to be above 0.5, since NCCL connects no two workers on one GPU."""
    gpus_per_learner_rank: float = 1.0
    """GPUs that Ray reserves for each learner rank; above 0.5 where policy or critic has several, likewise."""
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
    second_judge: SecondJudge = SecondJudge.lexical
    """Who appraises the same dialogues once more, a judge that training never hears: `lexical` (rules on words), `embedded` (rules on
    embeddings; where a chat model speaks for the users), `openai` (a chat model at simulator.openai.endpoints, with simulator.llm's
    settings; simulator.openai's limits hold for it apart), or `none`."""
    judge_model: str = ""
    """Model of the second judge `openai`, as the endpoint knows it; empty takes simulator.openai.model."""

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
    critic: CriticConfig = field(default_factory=CriticConfig)
    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)
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
    """`auto` goes on from the newest complete checkpoint in `output_dir`; `never` refuses a folder that has one; or a checkpoint's path, of
    this run or, while this run has none, of another."""
    seed: int = 1
    """Seeds personas, users, sampling and initialisation."""
    output_dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"
    """Where the run writes."""
    check: bool = False
    """Compose, validate, print the resolved arithmetic, and stop."""

    def __post_init__(self) -> None:
        at_least(1, "", num_iterations=self.num_iterations, keep_checkpoints=self.keep_checkpoints)
        at_least(0, "", save_every=self.save_every)
        dialogues, group_size = self.rollout.dialogues_per_iteration, self.algorithm.group_size
        whole = dialogues % group_size == 0
        require(whole, "rollout.dialogues_per_iteration", dialogues, f"use a multiple of algorithm.group_size={group_size}")
        updates, groups = self.algorithm.updates_per_iteration, dialogues // group_size
        require(updates <= groups, "algorithm.updates_per_iteration", updates, f"use at most {groups}, a persona's group a step")
        sampled, longest = self.rollout.max_turn_tokens, self.model.max_context_tokens
        way_out = f"with max_thinking_tokens, where rollout.think is on, use less than model.max_context_tokens={longest}"
        require(sampled < longest, "rollout.max_reply_tokens", self.rollout.max_reply_tokens, way_out)
        warms_up, thought = self.rollout.think and self.warm_up.dialogues > 0, self.warm_up.max_thought_tokens
        replies, step = self.warm_up.dialogues * self.warm_up.max_turns, self.warm_up.batch_size
        require(not warms_up or step <= replies, "warm_up.batch_size", step, f"use at most {replies}, warm_up.dialogues x max_turns")
        require(not warms_up or thought < sampled, "warm_up.max_thought_tokens", thought, f"use less than {sampled}, the tokens of a turn")
        prefit, last = self.critic.prefit_iterations, self.num_iterations
        moves = not self.has_critic or prefit < last
        require(moves, "critic.prefit_iterations", prefit, f"use less than num_iterations={last}, or the policy never moves")
        trained = {"learner": self.learner}
        if self.has_critic and self.critic.trunk is CriticTrunk.trained:  # the head on a frozen trunk is float32 whatever the model is
            trained["critic"] = self.critic
        for group, learner in trained.items():
            exact = self.model.dtype is Precision.float32 or learner.zero_stage >= 1
            require(exact, f"{group}.zero_stage", learner.zero_stage, "use 1 or more with model.dtype=bfloat16, or model.dtype=float32")
        self._check_second_judge()

    def _check_second_judge(self) -> None:
        """It has to differ from the one that speaks for the users."""
        second, simulator = self.evaluation.second_judge, self.simulator
        embedded = second is SecondJudge.embedded and simulator.backend is SimulatorBackend.embedded
        require(not embedded, "evaluation.second_judge", second.value, "use lexical, openai or none; the embedded users judge first")
        if second is SecondJudge.openai:
            model, key = self.evaluation.judge_model or simulator.openai.model, "evaluation.judge_model"
            require(bool(model), key, "''", "evaluation.second_judge=openai needs the model's name as the endpoint knows it")
            same = simulator.backend is SimulatorBackend.openai and model == simulator.openai.model
            require(not same, key, model, "use another model than simulator.openai.model, which is the first judge")

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm trains a critic."""
        return self.algorithm.name is AlgorithmName.ppo

    @property
    def uses_endpoints(self) -> bool:
        """Whether anything asks the models at simulator.openai.endpoints: users, their judges, or the second judge."""
        judged = self.evaluation.num_personas > 0 and self.evaluation.second_judge is SecondJudge.openai
        return judged or self.simulator.backend is SimulatorBackend.openai or bool(self.simulator.further_judges)

    @property
    def lasting_options(self) -> dict[str, str]:
        """Options that a learner's saved state, and a comparison with the evaluation before training, hold for; by key. A run goes on only
        with equal ones."""
        keys = ["model.path", "model.dtype", "learner.zero_stage", "algorithm.name", "rollout.think", "model.lora.rank"]
        if self.model.lora.rank:
            keys += ["model.lora.alpha", "model.lora.target_modules"]
        if self.has_critic:
            keys += ["critic.num_layers", "critic.head_units", "critic.zero_stage", "critic.trunk"]
        if self.evaluation.num_personas:
            keys += ["seed", "data.evaluation", "simulator.backend", "simulator.engine.model", "simulator.openai.model"]
            keys += ["evaluation.max_turns", "evaluation.temperature", "model.system_prompt", "model.max_context_tokens"]
            keys += ["rollout.max_reply_tokens", "rollout.end_on_truncation"]
            keys += ["rollout.max_thinking_tokens", "model.think_instruction"] if self.rollout.think else []
        values = {key: attrgetter(key)(self) for key in keys}
        return {key: str(value.value if isinstance(value, Enum) else value) for key, value in values.items()}

    @property
    def num_personas(self) -> int:
        """Personas an iteration."""
        return self.rollout.dialogues_per_iteration // self.algorithm.group_size
