"""Every option of a run: name, unit, default, meaning and check.

The YAML files under `conf/` hold only differences from the defaults here. `launch.py` composes them and calls
`OmegaConf.to_object` once, which runs the checks in `__post_init__`; after that a configuration never
changes. `slots=True` refuses a misspelt key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.data import DataConfig
from rlver_dist.config.enums import AlgorithmName, CriticTrunk, Precision, SecondJudge, SimulatorBackend
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.learner import CriticConfig, LearnerConfig, WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.config.tracking import TrackingConfig
from rlver_dist.errors import ConfigError


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
    """`auto` goes on from the newest complete checkpoint in `output_dir`; `never` refuses a folder that has
    one; or a checkpoint's path, of this run or, while this run has none, of another."""
    seed: int = 1
    """Seeds personas, users, sampling and initialisation."""
    output_dir: str = "runs/${now:%Y-%m-%d_%H-%M-%S}"
    """Where the run writes."""
    check: bool = False
    """Compose, validate, print the resolved arithmetic, and stop."""

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ConfigError(f"num_iterations={self.num_iterations}: use 1 or more")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"keep_checkpoints={self.keep_checkpoints}: use 1 or more")
        if self.save_every < 0:
            raise ConfigError(f"save_every={self.save_every}: use 0 or more")
        self._check_groups()
        self._check_turn_tokens()
        if self.has_critic and self.critic.pretrain_iterations >= self.num_iterations:
            raise ConfigError(
                f"critic.pretrain_iterations={self.critic.pretrain_iterations}: use less than "
                f"num_iterations={self.num_iterations}, or the policy never moves"
            )
        self._check_zero_stage("learner", self.learner)
        # The head on a frozen backbone is float32, whatever the model is.
        if self.has_critic and self.critic.trunk is CriticTrunk.trained:
            self._check_zero_stage("critic", self.critic)
        self._check_second_judge()

    def _check_groups(self) -> None:
        dialogues = self.rollout.dialogues_per_iteration
        group_size = self.algorithm.group_size
        if dialogues % group_size != 0:
            raise ConfigError(
                f"rollout.dialogues_per_iteration={dialogues}: use a multiple of "
                f"algorithm.group_size={group_size}"
            )
        # A group stays together in one optimizer step, so there are no more steps than groups.
        if self.algorithm.updates_per_iteration > self.num_personas:
            raise ConfigError(
                f"algorithm.updates_per_iteration={self.algorithm.updates_per_iteration}: use at most "
                f"{self.num_personas}, a persona's group a step"
            )

    def _check_turn_tokens(self) -> None:
        turn_tokens = self.rollout.max_turn_tokens
        if turn_tokens >= self.model.max_context_tokens:
            raise ConfigError(
                f"rollout.max_reply_tokens={self.rollout.max_reply_tokens}: with max_thinking_tokens, where "
                f"rollout.think is on, use less than model.max_context_tokens={self.model.max_context_tokens}"
            )
        if not self.rollout.think or self.warm_up.dialogues == 0:
            return
        replies = self.warm_up.dialogues * self.warm_up.max_turns
        if self.warm_up.batch_size > replies:
            raise ConfigError(
                f"warm_up.batch_size={self.warm_up.batch_size}: use at most {replies}, warm_up.dialogues x "
                f"max_turns"
            )
        if self.warm_up.max_thought_tokens >= turn_tokens:
            raise ConfigError(
                f"warm_up.max_thought_tokens={self.warm_up.max_thought_tokens}: use less than {turn_tokens}, "
                f"the tokens of a turn"
            )

    def _check_zero_stage(self, group: str, learner: LearnerConfig) -> None:
        # DeepSpeed's stage 0 cannot accumulate a bfloat16 model's gradients in float32.
        if self.model.dtype is not Precision.float32 and learner.zero_stage < 1:
            raise ConfigError(
                f"{group}.zero_stage={learner.zero_stage}: use 1 or more with model.dtype=bfloat16, or "
                f"model.dtype=float32"
            )

    def _check_second_judge(self) -> None:
        """The second judge has to differ from the one that speaks for the users."""
        second = self.evaluation.second_judge
        backend = self.simulator.backend
        if second is SecondJudge.embedded and backend is SimulatorBackend.embedded:
            raise ConfigError(
                f"evaluation.second_judge={second.value}: use lexical, openai or none; the embedded users "
                f"judge first"
            )
        if second is not SecondJudge.openai:
            return
        model = self.evaluation.judge_model or self.simulator.openai.model
        if not model:
            raise ConfigError(
                "evaluation.judge_model='': evaluation.second_judge=openai needs the model's name as the "
                "endpoint knows it"
            )
        if backend is SimulatorBackend.openai and model == self.simulator.openai.model:
            raise ConfigError(
                f"evaluation.judge_model={model}: use another model than simulator.openai.model, which is "
                f"the first judge"
            )

    @property
    def has_critic(self) -> bool:
        """Whether the algorithm trains a critic."""
        return self.algorithm.name is AlgorithmName.ppo

    @property
    def uses_endpoints(self) -> bool:
        """Whether anything asks the models at simulator.openai.endpoints: users, their judges, or the second
        judge."""
        judged = self.evaluation.num_personas > 0 and self.evaluation.second_judge is SecondJudge.openai
        return (
            judged or self.simulator.backend is SimulatorBackend.openai or bool(self.simulator.further_judges)
        )

    @property
    def resume_fingerprint(self) -> dict[str, str]:
        """Options that a learner's saved state, and a comparison with the evaluation before training, hold
        for; by key. A run goes on only with equal ones."""
        keys = [
            "model.path",
            "model.dtype",
            "learner.zero_stage",
            "algorithm.name",
            "rollout.think",
            "model.lora.rank",
        ]
        if self.model.lora.rank:
            keys += ["model.lora.alpha", "model.lora.target_modules"]
        if self.has_critic:
            keys += ["critic.num_layers", "critic.head_units", "critic.zero_stage", "critic.trunk"]
        if self.evaluation.num_personas:
            # With another one of these, the results before training and after would be of two evaluations.
            keys += [
                "seed",
                "data.evaluation",
                "simulator.backend",
                "simulator.engine.model",
                "simulator.openai.model",
                "evaluation.max_turns",
                "evaluation.temperature",
                "model.system_prompt",
                "model.max_context_tokens",
                "rollout.max_reply_tokens",
                "rollout.end_on_truncation",
            ]
            if self.rollout.think:
                keys += ["rollout.max_thinking_tokens", "model.think_instruction"]
        values = {key: attrgetter(key)(self) for key in keys}
        return {key: str(value.value if isinstance(value, Enum) else value) for key, value in values.items()}

    @property
    def num_personas(self) -> int:
        """Personas an iteration."""
        return self.rollout.dialogues_per_iteration // self.algorithm.group_size
