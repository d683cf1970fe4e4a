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
from rlver_dist.config.checks import at_least, require
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.data import DataConfig
from rlver_dist.config.enums import AlgorithmName, CriticTrunk, Precision, SecondJudge, SimulatorBackend
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.learner import CriticConfig, LearnerConfig, WarmUpConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.config.tracking import TrackingConfig


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
        at_least(1, "", num_iterations=self.num_iterations, keep_checkpoints=self.keep_checkpoints)
        at_least(0, "", save_every=self.save_every)
        dialogues, group_size = self.rollout.dialogues_per_iteration, self.algorithm.group_size
        whole = dialogues % group_size == 0
        require(
            whole,
            "rollout.dialogues_per_iteration",
            dialogues,
            f"use a multiple of algorithm.group_size={group_size}",
        )
        updates, groups = self.algorithm.updates_per_iteration, dialogues // group_size
        require(
            updates <= groups,
            "algorithm.updates_per_iteration",
            updates,
            f"use at most {groups}, a persona's group a step",
        )
        sampled, longest = self.rollout.max_turn_tokens, self.model.max_context_tokens
        way_out = (
            f"with max_thinking_tokens, where rollout.think is on, use less than "
            f"model.max_context_tokens={longest}"
        )
        require(sampled < longest, "rollout.max_reply_tokens", self.rollout.max_reply_tokens, way_out)
        warms_up, thought = self.rollout.think and self.warm_up.dialogues > 0, self.warm_up.max_thought_tokens
        replies, step = self.warm_up.dialogues * self.warm_up.max_turns, self.warm_up.batch_size
        require(
            not warms_up or step <= replies,
            "warm_up.batch_size",
            step,
            f"use at most {replies}, warm_up.dialogues x max_turns",
        )
        require(
            not warms_up or thought < sampled,
            "warm_up.max_thought_tokens",
            thought,
            f"use less than {sampled}, the tokens of a turn",
        )
        pretrain, last = self.critic.pretrain_iterations, self.num_iterations
        moves = not self.has_critic or pretrain < last
        require(
            moves,
            "critic.pretrain_iterations",
            pretrain,
            f"use less than num_iterations={last}, or the policy never moves",
        )
        trained = {"learner": self.learner}
        if (
            self.has_critic and self.critic.trunk is CriticTrunk.trained
        ):  # the head on a frozen backbone is float32 whatever the model is
            trained["critic"] = self.critic
        for group, learner in trained.items():
            exact = self.model.dtype is Precision.float32 or learner.zero_stage >= 1
            require(
                exact,
                f"{group}.zero_stage",
                learner.zero_stage,
                "use 1 or more with model.dtype=bfloat16, or model.dtype=float32",
            )
        self._check_second_judge()

    def _check_second_judge(self) -> None:
        """It has to differ from the one that speaks for the users."""
        second, simulator = self.evaluation.second_judge, self.simulator
        embedded = second is SecondJudge.embedded and simulator.backend is SimulatorBackend.embedded
        require(
            not embedded,
            "evaluation.second_judge",
            second.value,
            "use lexical, openai or none; the embedded users judge first",
        )
        if second is SecondJudge.openai:
            model, key = self.evaluation.judge_model or simulator.openai.model, "evaluation.judge_model"
            require(
                bool(model),
                key,
                "''",
                "evaluation.second_judge=openai needs the model's name as the endpoint knows it",
            )
            same = simulator.backend is SimulatorBackend.openai and model == simulator.openai.model
            require(
                not same,
                key,
                model,
                "use another model than simulator.openai.model, which is the first judge",
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
            keys += [
                "seed",
                "data.evaluation",
                "simulator.backend",
                "simulator.engine.model",
                "simulator.openai.model",
            ]
            keys += [
                "evaluation.max_turns",
                "evaluation.temperature",
                "model.system_prompt",
                "model.max_context_tokens",
            ]
            keys += ["rollout.max_reply_tokens", "rollout.end_on_truncation"]
            keys += ["rollout.max_thinking_tokens", "model.think_instruction"] if self.rollout.think else []
        values = {key: attrgetter(key)(self) for key in keys}
        return {key: str(value.value if isinstance(value, Enum) else value) for key, value in values.items()}

    @property
    def num_personas(self) -> int:
        """Personas an iteration."""
        return self.rollout.dialogues_per_iteration // self.algorithm.group_size
