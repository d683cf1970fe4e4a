"""How long a run is said to take, by hand."""

import re

import pytest

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.dialogue import Turn
from rlver_dist.tracking import forecast as forecast_module
from rlver_dist.tracking.forecast import TRAINED, Forecast
from tests.unit import builders


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(forecast_module, "time", clock)
    return clock


def reply(index: int, prompt: int, tokens: int) -> Turn:
    return builders.turn(index, prompt_ids=[0] * prompt, reply_ids=[0] * tokens)


def unheard(think: bool) -> Forecast:
    return Forecast(
        algorithm=AlgorithmConfig(),
        rollout=RolloutConfig(
            dialogues_per_iteration=8, max_turns=2, max_reply_tokens=64, max_thinking_tokens=20, think=think
        ),
        evaluation=EvaluationConfig(num_personas=10, max_turns=4),
        warm_up=WarmUpConfig(dialogues=4, max_turns=3, max_thought_tokens=10, epochs=2, batch_size=4),
    )


def heard(think: bool, clock: Clock) -> Forecast:
    """30 replies of 40 tokens in 60 s, so 20 tokens a second; prompts begin with 100 tokens and grow by 70 a
    turn."""
    forecast = unheard(think)
    forecast.score_rate = 200.0
    with forecast.sampling():
        for _ in range(15):
            forecast.hear(reply(0, 100, 40))
            forecast.hear(reply(2, 240, 40))
        clock.now += 60
    return forecast


def stage_seconds(forecast: Forecast, monkeypatch, *, warms_up: bool = False) -> dict[str, float]:
    """Unrounded seconds of one stage of each kind that the text names."""
    with monkeypatch.context() as patch:
        patch.setattr(forecast_module, "duration", lambda seconds: f"<{seconds!r}>")
        text = forecast.text(warms_up=warms_up, evaluations=1, iterations=1)
    told = re.findall(r"(evaluation|warm-up|iterations) (?:1 x )?<([^>]+)>", text)
    return {stage: float(seconds) for stage, seconds in told}


def test_it_is_given_after_a_minute_of_sampling_and_not_before(clock):
    forecast = unheard(think=False)
    forecast.score_rate = 200.0
    assert not forecast.ready
    with forecast.sampling():
        clock.now += 59
        forecast.hear(reply(0, 100, 40))
        assert not forecast.ready
    clock.now += 100  # seconds in which nothing is sampled do not count
    assert not forecast.ready
    with forecast.sampling():
        clock.now += 1
        assert forecast.ready


def test_dialogues_that_are_held_at_once_count_their_seconds_once(clock, monkeypatch):
    forecast = unheard(think=False)
    forecast.score_rate = 200.0
    forecast.hear(reply(0, 100, 40))
    with forecast.sampling():
        clock.now += 20
        with forecast.sampling():
            clock.now += 20
        clock.now += 19
        assert not forecast.ready
        clock.now += 1
        assert forecast.ready
    clock.now += 100
    # 40 tokens in 60 s; a dialogue of 4 turns has 4 x 40 tokens to sample and 100 + 4 x 80 to score.
    seconds = stage_seconds(forecast, monkeypatch)
    assert seconds["evaluation"] == pytest.approx(10 * (4 * 40 / (40 / 60) + 420 / 200))


def test_without_a_measured_learner_there_is_none(clock):
    forecast = heard(False, clock)
    forecast.score_rate = 0.0
    assert not forecast.ready


def test_replies_without_thinking_by_hand(clock, monkeypatch):
    forecast = heard(False, clock)
    # A dialogue of 4 turns: 160 tokens to sample in 8 s, 100 + 4 x 70 tokens to score in 1.9 s; ten of them.
    # One of 2 turns: 80 tokens in 4 s, TRAINED x (100 + 2 x 70) tokens in TRAINED x 1.2 s; eight of them.
    evaluation, iteration = 10 * (8 + 1.9), 8 * (4 + TRAINED * 1.2)
    assert stage_seconds(forecast, monkeypatch) == pytest.approx(
        {"evaluation": evaluation, "iterations": iteration}
    )
    text = forecast.text(warms_up=False, evaluations=2, iterations=20)
    assert (
        f"takes about {(2 * evaluation + 20 * iteration) / 60:.0f} min more: evaluation 2 x 99 s, "
        f"iterations 20 x 66 s;" in text
    )
    assert "num_iterations" in text and "warm-up" not in text


def test_replies_with_thinking_by_hand(clock, monkeypatch):
    forecast = heard(True, clock)
    # 10 tokens of thought more to sample; each reply of 50 branches off a history that grows by 70.
    seconds = stage_seconds(forecast, monkeypatch, warms_up=True)
    assert seconds["iterations"] == pytest.approx(8 * (2 * 50 / 20 + TRAINED * (100 + 2 * (70 + 50)) / 200))
    # Replies of 40 and thoughts of 10 are sampled; two passes forward and backward, and the teacher's.
    assert seconds["warm-up"] == pytest.approx(
        4 * (3 * 50 / 20 + 2 * (TRAINED + 1) * (100 + 3 * (70 + 50)) / 200)
    )
    assert "warm-up" in forecast.text(warms_up=True, evaluations=3, iterations=1)


def test_what_is_left_counts_the_last_evaluation(clock):
    forecast = heard(False, clock)
    assert forecast.left_s(iterations=3, iteration_s=10.0) == 30.0
    forecast.evaluation_s = 25.0
    assert forecast.left_s(iterations=3, iteration_s=10.0) == 55.0
