"""From one iteration's dialogues to updated learners: select, reward, assign credit, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlver_dist.algorithms import kl
from rlver_dist.cluster.components import Critic, Policy
from rlver_dist.concurrency import all_or_none
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import KLPlacement
from rlver_dist.dialogue import Dialogue
from rlver_dist.experience.credit import (
    dialogue_advantages,
    grpo_credit,
    ppo_credit,
    samples_of,
    segment_lengths,
    token_rewards,
)
from rlver_dist.experience.guards import guard_rewards
from rlver_dist.experience.rewards import dialogue_reward, select_trainable
from rlver_dist.experience.samples import TurnSample
from rlver_dist.tracking.guard_metrics import guard_metrics
from rlver_dist.tracking.metrics import Metric, Reduction, reduce_metrics


@dataclass(kw_only=True, slots=True)
class StepResult:
    """What a training step did.

    Attributes:
        rewards: by dialogue id, of every dialogue that was scored, after the guards.
        advantages: mean over a dialogue's trained tokens, by dialogue id; empty where there was nothing to
            learn from.
        metrics: of the learners, of the guards and of what was left out.
        kl_coef: weight of the KL term in the next iteration.
    """

    rewards: dict[str, float]
    advantages: dict[str, float]
    metrics: list[Metric]
    kl_coef: float


async def training_step(
    dialogues: Sequence[Dialogue],
    *,
    algorithm: AlgorithmConfig,
    policy: Policy,
    critic: Critic | None,
    kl_coef: float,
    critic_only: bool,
) -> StepResult:
    """Update the learners on `dialogues`.

    Args:
        dialogues: all of one iteration, failed ones included; leaving those out happens here and nowhere
            else.
        algorithm: rewards, credit, guards and the KL term.
        policy: the policy learner.
        critic: the critic learner; None trains by GRPO.
        kl_coef: weight of the KL term.
        critic_only: leave the policy as it is.
    """
    # A lone dialogue of a group has nothing to be compared with; a critic compares it all the same.
    selection = select_trainable(dialogues, min_group=1 if critic else 2)
    earned = {dialogue.id: dialogue_reward(dialogue, algorithm.end_rewards) for dialogue in selection.kept}
    guarded = guard_rewards(selection.kept, earned, algorithm.guards)
    rewards = guarded.after
    left_out = [
        Metric("rollout/dropped_groups", selection.num_dropped_groups, Reduction.sum),
        Metric("rollout/untrained_dialogues", selection.num_failed + selection.num_dropped, Reduction.sum),
        *guard_metrics(guarded),
    ]
    samples = samples_of(selection.kept)
    if not samples:
        return StepResult(rewards=rewards, advantages={}, metrics=left_out, kl_coef=kl_coef)
    started = time.monotonic()
    values, kl_tokens = await _scores(samples, policy, critic, _kl_in_reward(algorithm, kl_coef))
    scored_s = time.monotonic() - started
    updates = []
    paid = token_rewards(samples, selection.kept, rewards, algorithm.reward_placement)
    if critic and values is not None:
        advantages, returns = ppo_credit(samples, algorithm, paid, values, kl_tokens, kl_coef)
        updates.append(critic.update(samples, values, returns))
    else:
        segments = segment_lengths(selection.kept, algorithm.reward_placement)
        advantages = grpo_credit(samples, algorithm, paid, segments, kl_tokens, kl_coef)
    if not critic_only:
        updates.append(policy.update(samples, advantages, kl_coef))
    # Policy and critic share nothing but the samples, so they learn at the same time.
    metrics = [metric for learned in await all_or_none(updates) for metric in learned]
    metrics.append(Metric("time/scoring_s", scored_s, Reduction.last))
    if kl_tokens is not None:
        metrics.append(_mean_kl(kl_tokens))
    metrics.append(Metric("learner/kl_coef", kl_coef, Reduction.last))
    return StepResult(
        rewards=rewards,
        advantages=dialogue_advantages(samples, advantages),
        metrics=left_out + metrics,
        # While the critic learns alone the policy stands still, and its KL says nothing about the weight.
        kl_coef=kl_coef if critic_only else _next_kl_coef(algorithm, kl_coef, metrics, len(selection.kept)),
    )


def _kl_in_reward(algorithm: AlgorithmConfig, kl_coef: float) -> bool:
    """Whether credit needs the KL; with the KL in the loss the learner computes it while it updates."""
    return kl_coef > 0 and algorithm.kl_placement is KLPlacement.reward


async def _scores(
    samples: list[TurnSample], policy: Policy, critic: Critic | None, with_kl: bool
) -> tuple[list[Tensor] | None, list[Tensor] | None]:
    """What credit needs of the learners: values and KL, `[n_i]` for each sample; None where it needs none.

    Both learners compute at the same time.
    """

    async def nothing() -> None:
        return None

    values, kl_tokens = await all_or_none(
        (
            critic.values(samples) if critic else nothing(),
            policy.kl_tokens(samples) if with_kl else nothing(),
        )
    )
    return values, kl_tokens


def _mean_kl(kl_tokens: list[Tensor]) -> Metric:
    count = sum(len(tokens) for tokens in kl_tokens)
    return Metric(
        "learner/kl_ref", sum(float(tokens.sum()) for tokens in kl_tokens) / count, Reduction.mean, count
    )


def _next_kl_coef(
    algorithm: AlgorithmConfig, kl_coef: float, metrics: list[Metric], num_dialogues: int
) -> float:
    """The weight adapted to the KL that this iteration's policy had; unchanged where it is fixed or was not
    measured."""
    measured = [metric for metric in metrics if metric.key == "learner/kl_ref"]
    if algorithm.kl_target == 0 or not measured:
        return kl_coef
    mean = reduce_metrics(measured)["learner/kl_ref"]
    return kl.adapt(kl_coef, mean, algorithm.kl_target, algorithm.kl_horizon, num_dialogues)
