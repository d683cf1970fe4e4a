"""A training step between the dialogues and the learners: what each token is paid and when the KL's weight
moves."""

import asyncio

import pytest
import torch
from torch import Tensor

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.enums import AlgorithmName, KLPlacement, RewardPlacement
from rlver_dist.dialogue import Dialogue, Turn
from rlver_dist.trainer.training_step import StepResult, training_step
from tests.unit import builders


def dialogue(name: str, *emotions: float) -> Dialogue:
    """Turns of two tokens and one of user text before each, with these emotions after them."""
    turns: list[Turn] = []
    for index, (before, after) in enumerate(zip((30.0, *emotions), emotions, strict=False)):
        history = turns[-1].prompt_ids + turns[-1].reply_ids if turns else []
        turns.append(
            builders.turn(
                index,
                prompt_ids=[*history, 9],
                reply_ids=[1, 2],
                emotion_before=before,
                emotion_after=after,
            )
        )
    return builders.dialogue(turns, id=name, final_emotion=emotions[-1])


class Policy:
    """Notes its advantages; every token has a KL of 1 nat."""

    def __init__(self) -> None:
        self.advantages: dict[str, list[float]] = {}

    async def kl_tokens(self, samples) -> list[Tensor]:
        return [torch.ones(sample.num_trained) for sample in samples]

    async def update(self, samples, advantages, kl_coef):
        self.advantages = {
            sample.dialogue_id: part.tolist() for sample, part in zip(samples, advantages, strict=True)
        }
        return []


class Critic:
    """Expects 0.1 everywhere and notes what it is taught."""

    async def values(self, samples) -> list[Tensor]:
        return [torch.full((sample.num_trained,), 0.1) for sample in samples]

    async def update(self, samples, values, returns):
        self.returns = {
            sample.dialogue_id: part.tolist() for sample, part in zip(samples, returns, strict=True)
        }
        return []


class Paired:
    """A learner whose update waits until the other one's has begun, and then `fails` or goes on for long."""

    def __init__(
        self,
        mine: asyncio.Event,
        other: asyncio.Event,
        *,
        fails: bool = False,
        stays: bool = False,
        scores: bool = False,
    ) -> None:
        """`scores`: meets the other one when it scores already, not only in the update."""
        self._mine, self._other, self._fails, self._stays, self._scores = mine, other, fails, stays, scores
        self.ended = ""

    async def values(self, samples) -> list[Tensor]:
        if self._scores:
            await self._work()
        return [torch.zeros(sample.num_trained) for sample in samples]

    kl_tokens = values

    async def update(self, *_):
        await self._work()
        return []

    async def _work(self):
        self._mine.set()
        await self._other.wait()
        try:
            if self._fails:
                raise ConnectionError("this learner is gone")
            await asyncio.sleep(60 if self._stays else 0)
        except asyncio.CancelledError:
            self.ended = "called off"
            raise
        self.ended = "done"


TALKS = [dialogue("a", 40.0, 50.0), dialogue("b", 34.0, 30.0)]


def train(
    policy: Policy, critic: Critic | None = None, *, critic_only: bool = False, **options
) -> StepResult:
    algorithm = AlgorithmConfig(**options)
    return asyncio.run(
        training_step(
            TALKS,
            algorithm=algorithm,
            policy=policy,
            critic=critic,
            kl_coef=algorithm.kl_coef,
            critic_only=critic_only,
        )
    )


@pytest.mark.parametrize(
    ("placement", "a", "b"),
    [
        # 0.5 and 0.3 about 0.4, for all of a dialogue.
        (RewardPlacement.end, [0.1] * 4, [-0.1] * 4),
        # To go: 0.2 and 0 about 0.1 at first, then 0.1 and -0.04 about 0.03.
        (RewardPlacement.turns, [0.1, 0.1, 0.07, 0.07], [-0.1, -0.1, -0.07, -0.07]),
    ],
)
def test_grpo_is_paid_where_the_configuration_says(
    placement: RewardPlacement, a: list[float], b: list[float]
):
    policy = Policy()
    learned = train(policy, reward_placement=placement, normalize_by_std=False)
    assert policy.advantages == {"a": pytest.approx(a, abs=1e-6), "b": pytest.approx(b, abs=1e-6)}
    assert learned.advantages == {
        "a": pytest.approx(sum(a) / 4, abs=1e-6),
        "b": pytest.approx(sum(b) / 4, abs=1e-6),
    }
    assert learned.rewards == {"a": 0.5, "b": 0.3}


@pytest.mark.parametrize(
    ("placement", "a", "b"),
    [
        (RewardPlacement.end, [0.5] * 4, [0.3] * 4),
        (RewardPlacement.turns, [0.2, 0.2, 0.1, 0.1], [0.0, 0.0, -0.04, -0.04]),
    ],
)
def test_ppo_is_paid_where_the_configuration_says(placement: RewardPlacement, a: list[float], b: list[float]):
    policy, critic = Policy(), Critic()
    train(policy, critic, name=AlgorithmName.ppo, reward_placement=placement, whiten_advantages=False)
    assert critic.returns == {"a": pytest.approx(a, abs=1e-6), "b": pytest.approx(b, abs=1e-6)}
    assert policy.advantages["a"] == pytest.approx([value - 0.1 for value in a], abs=1e-6)


def test_the_kl_weight_waits_while_the_critic_learns_alone():
    adapts = dict(
        name=AlgorithmName.ppo, kl_coef=0.1, kl_target=0.05, kl_horizon=2.0, kl_placement=KLPlacement.reward
    )
    # 1 nat a token is far above the target: the largest step, 20 % over two dialogues of a horizon of two.
    assert train(Policy(), Critic(), **adapts).kl_coef == pytest.approx(0.12)
    assert train(Policy(), Critic(), critic_only=True, **adapts).kl_coef == 0.1


async def update_both(policy_options: dict, critic_options: dict) -> tuple[Paired, Paired, Exception | None]:
    """Both learners after a step, and what it raised."""
    begun = asyncio.Event(), asyncio.Event()
    policy, critic = Paired(*begun, **policy_options), Paired(*reversed(begun), **critic_options)
    algorithm = AlgorithmConfig(name=AlgorithmName.ppo, group_size=1, kl_placement=KLPlacement.reward)
    step = training_step(
        TALKS, algorithm=algorithm, policy=policy, critic=critic, kl_coef=0.1, critic_only=False
    )
    try:
        await asyncio.wait_for(step, 5)
    except ConnectionError as error:
        return policy, critic, error
    return policy, critic, None


def test_policy_and_critic_learn_at_the_same_time():
    policy, critic, failure = asyncio.run(update_both({}, {}))
    assert failure is None and policy.ended == critic.ended == "done"


@pytest.mark.parametrize("scores", [False, True], ids=["updating", "scoring"])
@pytest.mark.parametrize("failing", [0, 1], ids=["policy", "critic"])
def test_a_learner_that_fails_ends_the_step_without_waiting_for_the_other(failing: int, scores: bool):
    options = [{"stays": True, "scores": scores}, {"stays": True, "scores": scores}]
    options[failing] = {"fails": True, "scores": scores}
    *learners, failure = asyncio.run(update_both(*options))
    assert str(failure) == "this learner is gone" and learners[1 - failing].ended == "called off"
