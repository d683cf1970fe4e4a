"""Rewards, the selection of what is trained on, and the advantages of every trained token."""

import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlver_dist.config.algorithm import AlgorithmConfig, EndRewardConfig
from rlver_dist.config.enums import EndReward, RewardPlacement
from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.experience.credit import (
    dialogue_advantages,
    grpo_credit,
    ppo_credit,
    samples_of,
    segment_lengths,
    token_rewards,
)
from rlver_dist.experience.rewards import dialogue_reward, select_trainable
from rlver_dist.experience.samples import TurnSample
from tests.unit import builders


def make_dialogue(
    name: str = "d",
    group: str = "g",
    *,
    replies: tuple[int, ...] = (),
    end: EndReason = EndReason.MAX_TURNS,
    user: int = 1,
    edited: bool = False,
) -> Dialogue:
    """A dialogue with `replies` sampled tokens a turn and `user` tokens before each; where `edited`, no
    prompt extends the last."""
    turns: list[Turn] = []
    for index, length in enumerate(replies):
        history = turns[-1].prompt_ids + turns[-1].reply_ids if turns else []
        prompt = [100 + index] * user + history if edited else history + [100 + index] * user
        turns.append(
            builders.turn(index, prompt_ids=prompt, reply_ids=[200 + index] * length, emotion_after=35.0)
        )
    return builders.dialogue(turns, id=name, group_id=group, end_reason=end, final_emotion=45.0)


@dataclass(kw_only=True, slots=True)
class PaidSample(TurnSample):
    """A row that brings its dialogue's reward along."""

    reward: float


def make_sample(name: str, turn: int, num_trained: int, reward: float = 0.0, group: str = "g") -> PaidSample:
    return PaidSample(
        token_ids=[1] * (num_trained + 1),
        loss_mask=[False] + [True] * num_trained,
        rollout_logprobs=[0.0] + [-1.0] * num_trained,
        reward=reward,
        dialogue_id=name,
        group_id=group,
        turn_index=turn,
    )


def tensors(*columns: list[float]) -> list[Tensor]:
    return [torch.tensor(column) for column in columns]


def lists(columns: list[Tensor]) -> list[list[float]]:
    return [column.tolist() for column in columns]


TURNS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def at_the_end(samples: list[PaidSample]) -> list[Tensor]:
    """Each dialogue's reward on the last token of its last row."""
    last = {
        sample.dialogue_id: sample.turn_index
        for sample in sorted(samples, key=lambda sample: sample.turn_index)
    }
    return [
        torch.tensor(
            [0.0] * (sample.num_trained - 1)
            + [sample.reward * (last[sample.dialogue_id] == sample.turn_index)]
        )
        for sample in samples
    ]


def whole(
    samples: list[PaidSample], config: AlgorithmConfig, kl_tokens: list[Tensor] | None, kl_coef: float
) -> list[Tensor]:
    """GRPO of whole dialogues, paid at the end."""
    segments = {sample.dialogue_id: [0] for sample in samples}
    for sample in samples:
        segments[sample.dialogue_id][0] += sample.num_trained
    return grpo_credit(samples, config, at_the_end(samples), segments, kl_tokens, kl_coef)


def ppo(gamma: float = 1.0, gae_lambda: float = 1.0, whiten: bool = False) -> AlgorithmConfig:
    return AlgorithmConfig(gamma=gamma, gae_lambda=gae_lambda, whiten_advantages=whiten)


@pytest.mark.parametrize(
    "end", [EndReason.EMOTION_HIGH, EndReason.EMOTION_LOW, EndReason.GOODBYE, EndReason.MAX_TURNS]
)
def test_ends_that_are_not_the_policys_are_paid_by_emotion(end: EndReason):
    nothing = EndRewardConfig(
        malformed=EndReward.zero, over_long=EndReward.zero, context_overflow=EndReward.zero
    )
    assert dialogue_reward(make_dialogue(end=end), nothing) == pytest.approx(0.45)


FAULTS = (EndReason.MALFORMED, EndReason.OVER_LONG, EndReason.CONTEXT_OVERFLOW)


@pytest.mark.parametrize("end", FAULTS)
def test_ends_that_the_policy_caused_follow_their_own_rule(end: EndReason):
    for paid in (EndReward.emotion, EndReward.zero):
        unlike = EndReward.zero if paid is EndReward.emotion else EndReward.emotion
        rules = EndRewardConfig(**{other.value: unlike for other in FAULTS} | {end.value: paid})
        assert dialogue_reward(make_dialogue(end=end), rules) == pytest.approx(
            0.45 if paid is EndReward.emotion else 0.0
        )


def test_an_infrastructure_failure_is_never_scored():
    with pytest.raises(ValueError, match=r"never scored \(engine lost\)"):
        dialogue_reward(make_dialogue(end=EndReason.INFRASTRUCTURE), EndRewardConfig())


MIXED = [
    make_dialogue("b1", "b", replies=(1,)),
    make_dialogue("a2", "a", replies=(1,)),
    make_dialogue("b2", "b", replies=(1,), end=EndReason.INFRASTRUCTURE),
    make_dialogue("a0", "a", replies=(1,), end=EndReason.MALFORMED),
    make_dialogue("a1", "a", end=EndReason.CONTEXT_OVERFLOW),
    make_dialogue("b0", "b", replies=(0,), end=EndReason.MALFORMED),
    make_dialogue("c1", "c", replies=(1,), end=EndReason.INFRASTRUCTURE),
]


@pytest.mark.parametrize(
    ("min_group", "kept", "counts"),
    [(1, ["a0", "a2", "b1"], (4, 0, 0)), (2, ["a0", "a2"], (4, 1, 1)), (3, [], (4, 2, 3))],
)
def test_selection_drops_failures_then_groups_that_are_too_small(
    min_group: int, kept: list[str], counts: tuple[int, int, int]
):
    selection = select_trainable(MIXED, min_group)
    assert [dialogue.id for dialogue in selection.kept] == kept
    assert (selection.num_failed, selection.num_dropped_groups, selection.num_dropped) == counts
    assert select_trainable(reversed(MIXED), min_group) == selection


def test_grpo_gives_every_token_of_a_dialogue_its_advantage_over_the_group():
    samples = [
        make_sample("a", 0, 2, 0.2, "g"),
        make_sample("a", 1, 1, 0.2, "g"),
        make_sample("b", 0, 3, 0.6, "g"),
        make_sample("c", 0, 1, 0.9, "h"),
        make_sample("d", 0, 1, 0.3, "h"),
    ]
    advantages = whole(samples, AlgorithmConfig(normalize_by_std=False), None, kl_coef=5.0)
    assert lists(advantages) == [
        pytest.approx(row) for row in ([-0.2, -0.2], [-0.2], [0.2, 0.2, 0.2], [0.3], [-0.3])
    ]
    assert dialogue_advantages(samples, advantages) == pytest.approx(
        {"a": -0.2, "b": 0.2, "c": 0.3, "d": -0.3}
    )
    # 0.2 and 0.6 deviate by 0.4 / sqrt 2.
    scaled = whole(samples, AlgorithmConfig(normalize_by_std=True), None, kl_coef=5.0)
    assert scaled[2].tolist() == pytest.approx([math.sqrt(0.5)] * 3, abs=1e-5)


def test_grpo_takes_the_kl_of_the_whole_dialogue_off_its_reward():
    samples = [make_sample("a", 0, 2, 0.5), make_sample("a", 1, 1, 0.5), make_sample("b", 0, 1, 0.8)]
    # Rewards: 0.5 - 0.1 * (0.5 + 0.5 + 1) = 0.3 and 0.8 - 0.1 * -1 = 0.9, about 0.6.
    advantages = whole(
        samples, AlgorithmConfig(normalize_by_std=False), tensors([0.5, 0.5], [1.0], [-1.0]), kl_coef=0.1
    )
    assert lists(advantages) == [pytest.approx(row) for row in ([-0.3, -0.3], [-0.3], [0.3])]


def test_ppo_carries_across_the_turns_of_a_dialogue():
    samples = [make_sample("a", 0, 2, 1.0), make_sample("b", 0, 1, 0.4), make_sample("a", 1, 1, 1.0)]
    values = tensors([0.5, 0.2], [0.1], [0.6])
    # Dialogue a: rewards 0, 0, 1, deltas -0.3, 0.4, 0.4; b: 0.4 - 0.1.
    advantages, returns = ppo_credit(
        samples, ppo(gae_lambda=0.5), at_the_end(samples), values, None, kl_coef=5.0
    )
    assert lists(advantages) == [pytest.approx(row, abs=1e-6) for row in ([0.0, 0.6], [0.3], [0.4])]
    assert lists(returns) == [pytest.approx(row, abs=1e-6) for row in ([0.5, 0.8], [0.4], [1.0])]
    assert dialogue_advantages(samples, advantages) == pytest.approx({"a": 1.0 / 3, "b": 0.3}, abs=1e-6)
    advantages, returns = ppo_credit(samples, ppo(), at_the_end(samples), values, None, kl_coef=5.0)
    assert lists(advantages) == [pytest.approx(row, abs=1e-6) for row in ([0.5, 0.8], [0.3], [0.4])]
    assert lists(returns) == [pytest.approx(row, abs=1e-6) for row in ([1.0, 1.0], [0.4], [1.0])]


def moved(dialogue: Dialogue, *emotions: float) -> Dialogue:
    """The dialogue with these emotions after its turns, from 30 on."""
    turns = [
        replace(turn, emotion_before=before, emotion_after=after)
        for turn, before, after in zip(dialogue.turns, (30.0, *emotions), emotions, strict=False)
    ]
    return replace(dialogue, turns=turns, final_emotion=emotions[-1])


def test_a_reward_is_paid_at_the_end_or_as_the_emotion_moves():
    dialogue = moved(make_dialogue("a", replies=(2, 0, 1, 3)), 35.0, 33.0, 40.0, 28.0)
    samples = samples_of([dialogue])
    (at_once,) = token_rewards(samples, [dialogue], {"a": 0.28}, RewardPlacement.end)
    assert at_once.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.28])
    # The second turn has no token, so the token before it takes its -2 points.
    (by_turns,) = token_rewards(samples, [dialogue], {"a": 0.28}, RewardPlacement.turns)
    assert by_turns.tolist() == pytest.approx([0, 0.03, 0.07, 0, 0, -0.12])
    # A fault that is paid nothing takes the emotion that had been reached: 0 - 28 on top.
    (faulty,) = token_rewards(samples, [dialogue], {"a": 0.0}, RewardPlacement.turns)
    assert faulty.tolist() == pytest.approx([0, 0.03, 0.07, 0, 0, -0.40])


@given(
    replies=TURNS,
    emotions=st.lists(st.floats(0, 100), min_size=4, max_size=4),
    reward=st.floats(0, 1),
    edited=st.booleans(),
)
def test_turn_rewards_sum_to_the_reward_less_the_start(
    replies: list[int], emotions: list[float], reward: float, edited: bool
):
    dialogue = moved(make_dialogue("a", replies=tuple(replies), edited=edited), *emotions[: len(replies)])
    samples = samples_of([dialogue])
    for placement, total in ((RewardPlacement.end, reward), (RewardPlacement.turns, reward - 0.3)):
        paid = token_rewards(samples, [dialogue], {"a": reward}, placement)
        assert float(torch.cat(paid).sum()) == pytest.approx(total, abs=1e-5)


def credited(
    dialogues: list[Dialogue],
    rewards: dict[str, float],
    *,
    scaled: bool = False,
    kl: list[Tensor] | None = None,
    placement: RewardPlacement = RewardPlacement.turns,
) -> list[Tensor]:
    samples = samples_of(dialogues)
    paid = token_rewards(samples, dialogues, rewards, placement)
    segments = segment_lengths(dialogues, placement)
    return grpo_credit(samples, AlgorithmConfig(normalize_by_std=scaled), paid, segments, kl, kl_coef=0.1)


@pytest.mark.parametrize("edited", [False, True])
def test_grpo_by_turns_compares_a_turn_by_what_is_still_to_come(edited: bool):
    dialogues = [
        moved(make_dialogue("a", replies=(2, 1, 1), edited=edited), 40.0, 38.0, 50.0),
        moved(make_dialogue("b", replies=(1, 2), edited=edited), 34.0, 30.0),
        moved(make_dialogue("c", replies=(1, 0, 2), edited=edited), 25.0, 27.0, 22.0),
    ]
    rewards = {"a": 0.50, "b": 0.30, "c": 0.22}
    # To go: first turns 0.20, 0.00, -0.08 about 0.04; second turns 0.10 and -0.04 about 0.03 (c says
    # nothing); third turns 0.12 and -0.05 about 0.035.
    expected = [*(0.16, 0.16, 0.07, 0.085), *(-0.04, -0.07, -0.07), *(-0.12, -0.085, -0.085)]
    assert torch.cat(credited(dialogues, rewards)).tolist() == pytest.approx(expected, abs=1e-6)
    # Squared distances sum to 0.0416 (first turns), 0.0098 and 0.01445, with 2 + 1 + 1 degrees of freedom.
    scale = math.sqrt(0.06585 / 4)
    scaled = torch.cat(credited(dialogues, rewards, scaled=True)).tolist()
    assert scaled == pytest.approx([value / scale for value in expected], abs=1e-4)


def test_grpo_by_turns_gives_nothing_to_a_turn_that_no_other_dialogue_reached():
    dialogues = [
        moved(make_dialogue("a", replies=(1, 2)), 40.0, 50.0),
        moved(make_dialogue("b", replies=(1,)), 35.0),
    ]
    assert torch.cat(credited(dialogues, {"a": 0.5, "b": 0.35})).tolist() == pytest.approx(
        [0.075, 0.0, 0.0, -0.075], abs=1e-6
    )
    # KL 1 and 2 nats of the later turn count for the first as well: 0.2 - 0.1 * 3 = -0.1 against 0.05.
    with_kl = credited(dialogues, {"a": 0.5, "b": 0.35}, kl=tensors([0.0, 1.0, 2.0], [0.0]))
    assert torch.cat(with_kl).tolist() == pytest.approx([-0.075, 0.0, 0.0, 0.075], abs=1e-6)


@settings(deadline=None)
@given(
    emotions=st.lists(st.floats(0, 100), min_size=2, max_size=4),
    lengths=st.lists(TURNS, min_size=4, max_size=4),
)
def test_dialogues_of_one_turn_are_paid_the_same_by_turns_or_at_the_end(
    emotions: list[float], lengths: list[list[int]]
):
    dialogues = [
        moved(make_dialogue(f"d{n}", replies=(lengths[n][0],)), emotion) for n, emotion in enumerate(emotions)
    ]
    rewards = {dialogue.id: dialogue.final_emotion / 100 for dialogue in dialogues}
    at_end = credited(dialogues, rewards, placement=RewardPlacement.end)
    assert lists(credited(dialogues, rewards)) == [
        pytest.approx(column, abs=1e-6) for column in lists(at_end)
    ]


@settings(deadline=None)
@given(
    paths=st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=2), min_size=2, max_size=4),
    last=st.integers(0, 1000),
)
def test_grpo_by_turns_finds_nothing_between_first_turns_that_led_to_the_same_end(
    paths: list[list[int]], last: int
):
    dialogues = [
        moved(make_dialogue(f"d{n}", replies=(1, 2, 1)), *(step / 10 for step in (*path, last)))
        for n, path in enumerate(paths)
    ]
    columns = credited(dialogues, {dialogue.id: last / 1000 for dialogue in dialogues}, scaled=True)
    assert max(abs(float(column[0])) for column in columns) < 1e-6


def test_ppo_takes_the_kl_of_each_token_off_its_own_reward():
    samples = [make_sample("a", 0, 2, 1.0), make_sample("a", 1, 1, 1.0)]
    kl_tokens = tensors([1.0, 2.0], [-1.0])
    # Rewards -0.1, -0.2, 1.1 and values 0: sums from behind 0.8, 0.9, 1.1.
    advantages, returns = ppo_credit(
        samples, ppo(), at_the_end(samples), tensors([0.0, 0.0], [0.0]), kl_tokens, kl_coef=0.1
    )
    assert lists(advantages) == lists(returns) == [pytest.approx([0.8, 0.9]), pytest.approx([1.1])]


def test_ppo_whitens_over_all_trained_tokens_and_leaves_the_returns():
    samples = [make_sample("a", 0, 3, 1.0), make_sample("b", 0, 1, 5.0)]
    advantages, returns = ppo_credit(
        samples, ppo(whiten=True), at_the_end(samples), tensors([0.0] * 3, [0.0]), None, kl_coef=0.0
    )
    assert lists(advantages) == [pytest.approx([-1 / math.sqrt(3)] * 3), pytest.approx([math.sqrt(3)])]
    assert lists(returns) == [[1.0, 1.0, 1.0], [5.0]]


@settings(max_examples=40, deadline=None)
@given(
    replies=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), min_size=1, max_size=3),
    placement=st.sampled_from(RewardPlacement),
    users=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    whiten=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_only_trained_tokens_count_however_they_lie_in_rows(
    replies: list[list[int]],
    placement: RewardPlacement,
    users: list[int],
    gamma: float,
    lam: float,
    whiten: bool,
    seed: int,
):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, sum(map(sum, replies)), generator=generator).unbind()
    results = []
    # The user's tokens, then one row a dialogue against one row a turn.
    for user, edited in ((1, False), (users[0], False), (users[1], True), (users[2], True)):
        dialogues = [
            make_dialogue(f"d{n}", replies=tuple(row), user=user, edited=edited)
            for n, row in enumerate(replies)
        ]
        samples = samples_of(dialogues)
        paid = token_rewards(
            samples, dialogues, {f"d{n}": 0.3 * (n + 1) for n in range(len(replies))}, placement
        )
        assert len(samples) == (
            sum(1 for row in replies for length in row if length) if edited else len(replies)
        )
        values, kl_tokens = (
            [part for part in column.split([sample.num_trained for sample in samples])] for column in numbers
        )
        columns = ppo_credit(samples, ppo(gamma, lam, whiten), paid, values, kl_tokens, kl_coef=0.1)
        results.append([torch.cat(column) for column in columns])
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


@given(TURNS, st.floats(0, 1, width=32), st.integers(0, 1000))
def test_without_discount_an_advantage_is_reward_less_value(replies: list[int], reward: float, seed: int):
    samples = [make_sample("d", turn, length, reward) for turn, length in enumerate(replies)]
    values = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed + length)) for length in replies
    ]
    advantages, returns = ppo_credit(samples, ppo(), at_the_end(samples), values, None, kl_coef=0.0)
    assert torch.cat(advantages).tolist() == pytest.approx((reward - torch.cat(values)).tolist(), abs=1e-6)
    assert torch.cat(returns).tolist() == pytest.approx([reward] * sum(replies), abs=1e-6)


@given(st.permutations(range(5)))
def test_the_order_of_samples_is_free(order: list[int]):
    samples = [make_sample("a", turn, 2, 0.5) for turn in (0, 1, 3)] + [
        make_sample("b", turn, 1, 0.7) for turn in (0, 2)
    ]
    values = [torch.arange(sample.num_trained) * 0.1 + 0.01 * index for index, sample in enumerate(samples)]
    for credit in (
        lambda samples, values: ppo_credit(
            samples, ppo(0.9, 0.8, whiten=True), at_the_end(samples), values, None, 0.0
        )[0],
        lambda samples, values: whole(samples, AlgorithmConfig(), values, 0.1),
    ):
        plain = credit(samples, values)
        shuffled = credit([samples[index] for index in order], [values[index] for index in order])
        assert lists(shuffled) == [pytest.approx(plain[index].tolist(), abs=1e-6) for index in order]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (tensors([0.0, 0.0]), "values: 1 columns for 2 samples"),
        (
            tensors([0.0, 0.0], [0.0, 0.0]),
            r"values of dialogue a, turn 1: shape \(2,\) does not fit 1 trained tokens",
        ),
        (tensors([0.0, math.nan], [0.0]), "values of dialogue a, turn 0: not finite"),
    ],
)
def test_columns_must_fit_the_samples(columns: list[Tensor], message: str):
    samples = [make_sample("a", 0, 2), make_sample("a", 1, 1)]
    with pytest.raises(ValueError, match=message):
        ppo_credit(samples, ppo(), at_the_end(samples), columns, None, kl_coef=0.0)
    for credit in (
        lambda: ppo_credit(samples, ppo(), at_the_end(samples), tensors([0.0, 0.0], [0.0]), columns, 0.1),
        lambda: whole(samples, AlgorithmConfig(), columns, 0.1),
    ):
        with pytest.raises(ValueError, match=message.replace("values", "kl_tokens")):
            credit()


def test_an_iteration_of_300_000_tokens_travels_without_copies():
    samples = [make_sample(f"d{number // 8}", number % 8, 300, 0.5) for number in range(1000)]
    advantages, returns = ppo_credit(
        samples,
        ppo(gae_lambda=0.9, whiten=True),
        at_the_end(samples),
        [torch.zeros(300)] * 1000,
        None,
        kl_coef=0.0,
    )
    assert len(pickle.dumps([advantages, returns])) < 2 * 300_000 * 4 * 1.5
