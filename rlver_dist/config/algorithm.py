"""Options of the algorithm: from rewards to a loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.config.enums import AlgorithmName, EndReward, KLEstimator, KLPlacement, RewardPlacement
from rlver_dist.config.guards import GuardsConfig
from rlver_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EndRewardConfig:
    """The rule for each end that the policy causes. All other ends are paid final emotion / 100."""

    malformed: EndReward = EndReward.zero
    """A broken format or no text for the user (RLVER, section 2.3: reward 0; the original's code takes
    nothing off, `emotion`)."""
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
    """Dialogues per persona and iteration, which GRPO compares with each other (RLVER, appendix B.4: 4 for
    GRPO, 1 for PPO)."""
    normalize_by_std: bool = True
    """Divide a group's centred rewards by their standard deviation + 1e-6 (GRPO, arXiv:2402.03300, section
    4.1.2)."""
    gamma: float = 1.0
    """PPO: discount per trained token (the original's: 1)."""
    gae_lambda: float = 1.0
    """PPO: lambda of generalised advantage estimation (arXiv:1506.02438; the original's: 1)."""
    reward_placement: RewardPlacement = RewardPlacement.end
    """Pay the reward at a dialogue's `end` (RLVER), or at each of its `turns` that turn's change of emotion /
    100: their sum is the reward less the start, so at gamma 1 the same policies are best (potential-based
    shaping, Ng et al. 1999), but no reply answers for the turns before it. GRPO then compares turn with turn,
    by what is still to come, instead of dialogue with dialogue."""
    whiten_advantages: bool = True
    """PPO: shift and scale the advantages of an iteration's trained tokens to mean 0 and deviation 1 (the
    original does)."""
    clip_low: float = 0.2
    """Lower clip range of the probability ratio: 1 - clip_low."""
    clip_high: float = 0.2
    """Upper clip range: 1 + clip_high."""
    tis_cap: float = 2.0
    """Cap of the truncated importance weight pi_learner_old / pi_rollout per token; 0 switches the correction
    off."""
    kl_coef: float = 0.0
    """Weight of KL(policy || reference); 0 builds no reference model (the original's value)."""
    kl_target: float = 0.0
    """KL in nats a token that the weight is adapted to (arXiv:1909.08593, section 2.2), starting from
    kl_coef; 0 keeps it fixed."""
    kl_horizon: float = 10000.0
    """Dialogues over which an adapted weight can change by its largest step, 20 %."""
    kl_estimator: KLEstimator = KLEstimator.k3
    """Which estimator of the KL."""
    kl_placement: KLPlacement = KLPlacement.loss
    """Where the KL enters."""
    entropy_coef: float = 0.001
    """Weight of the policy's token entropy, added to the objective (RLVER, train_rlver.sh)."""
    updates_per_iteration: int = 1
    """Optimizer steps that one iteration's dialogues are split into, thinking or not. The original's no-think
    recipes make 1; its think recipes make about 8, since it cuts by turns: use one number to compare the
    two."""
    end_rewards: EndRewardConfig = field(default_factory=EndRewardConfig)
    """Rewards of dialogues that the policy ended."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """What suspicious replies lose; nothing by default."""

    def __post_init__(self) -> None:
        # `not value > 0` instead of `value <= 0`, here and in the other groups: it refuses nan as well.
        least_size = 2 if self.name is AlgorithmName.grpo else 1
        if self.group_size < least_size:
            raise ConfigError(f"algorithm.group_size={self.group_size}: use {least_size} or more")
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"algorithm.gamma={self.gamma}: use a value from 0 to 1")
        if not 0 <= self.gae_lambda <= 1:
            raise ConfigError(f"algorithm.gae_lambda={self.gae_lambda}: use a value from 0 to 1")
        if not self.clip_low > 0:
            raise ConfigError(f"algorithm.clip_low={self.clip_low}: use a number above 0")
        if not self.clip_high > 0:
            raise ConfigError(f"algorithm.clip_high={self.clip_high}: use a number above 0")
        if not self.clip_low < 1:
            raise ConfigError(f"algorithm.clip_low={self.clip_low}: use a value below 1")
        if not self.tis_cap >= 0:
            raise ConfigError(f"algorithm.tis_cap={self.tis_cap}: use 0 or more")
        if not self.kl_coef >= 0:
            raise ConfigError(f"algorithm.kl_coef={self.kl_coef}: use 0 or more")
        if not self.entropy_coef >= 0:
            raise ConfigError(f"algorithm.entropy_coef={self.entropy_coef}: use 0 or more")
        if not self.kl_target >= 0:
            raise ConfigError(f"algorithm.kl_target={self.kl_target}: use 0 or more")
        if not self.kl_horizon > 0:
            raise ConfigError(f"algorithm.kl_horizon={self.kl_horizon}: use a number above 0")
        self._check_kl()
        if self.updates_per_iteration < 1:
            raise ConfigError(f"algorithm.updates_per_iteration={self.updates_per_iteration}: use 1 or more")

    def _check_kl(self) -> None:
        # As a loss, k1 = log pi - log ref has the gradient of log pi, which is 0 on average over the policy's
        # own samples.
        in_loss = self.kl_coef != 0 and self.kl_placement is not KLPlacement.reward
        if in_loss and self.kl_estimator is KLEstimator.k1:
            raise ConfigError(
                "algorithm.kl_estimator=k1: its gradient is 0 on average; use k2 or k3, or "
                "algorithm.kl_placement=reward"
            )
        # Adaptation multiplies the weight, and 0 stays 0.
        if self.kl_target != 0 and not self.kl_coef > 0:
            raise ConfigError(
                f"algorithm.kl_target={self.kl_target}: use algorithm.kl_coef above 0 to start from, or "
                f"kl_target=0"
            )
