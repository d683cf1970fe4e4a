"""Options of the algorithm: from rewards to a loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.config.checks import at_least, positive, require
from rlver_dist.config.enums import AlgorithmName, EndReward, KLEstimator, KLPlacement, RewardPlacement
from rlver_dist.config.guards import GuardsConfig


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
        at_least(2 if self.name is AlgorithmName.grpo else 1, "algorithm.", group_size=self.group_size)
        for key in ("gamma", "gae_lambda"):
            require(
                0 <= getattr(self, key) <= 1,
                f"algorithm.{key}",
                getattr(self, key),
                "use a value from 0 to 1",
            )
        positive("algorithm.", clip_low=self.clip_low, clip_high=self.clip_high)
        require(self.clip_low < 1, "algorithm.clip_low", self.clip_low, "use a value below 1")
        at_least(
            0,
            "algorithm.",
            tis_cap=self.tis_cap,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            kl_target=self.kl_target,
        )
        positive("algorithm.", kl_horizon=self.kl_horizon)
        pulls = (
            self.kl_coef == 0
            or self.kl_placement is KLPlacement.reward
            or self.kl_estimator is not KLEstimator.k1
        )
        require(
            pulls,
            "algorithm.kl_estimator",
            "k1",
            "its gradient is 0 on average; use k2 or k3, or algorithm.kl_placement=reward",
        )
        adapts = self.kl_target == 0 or self.kl_coef > 0
        require(
            adapts,
            "algorithm.kl_target",
            self.kl_target,
            "use algorithm.kl_coef above 0 to start from, or kl_target=0",
        )
        at_least(1, "algorithm.", updates_per_iteration=self.updates_per_iteration)
