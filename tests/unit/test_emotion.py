"""Emotion arithmetic, states, ends and presets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.dialogue import EndReason
from rlver_dist.simulator.emotion import EmotionRules, EmotionState, clip_change, end_reason, move, state_of
from rlver_dist.simulator.presets import PRESETS, resolve_rules

RULES = EmotionRules(start=30.0, max_change=10.0)
FINITE = st.floats(min_value=-1e6, max_value=1e6)
EMOTION = st.floats(min_value=0.0, max_value=100.0)


@pytest.mark.parametrize(
    ("emotion", "state"),
    [
        (100, "S"),
        (99.999, "A"),
        (70, "A"),
        (69.99, "B"),
        (40, "B"),
        (39.99, "C"),
        (10, "C"),
        (9.99, "F"),
        (0, "F"),
    ],
)
def test_states_are_half_open(emotion: float, state: str) -> None:
    assert state_of(emotion) is EmotionState(state)


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        (30.0, 4.5, 34.5),
        (30.0, 25.0, 40.0),
        (30.0, -25.0, 20.0),
        (96.0, 9.0, 100.0),
        (3.0, -9.0, 0.0),
        (30.1, 0.2, 30.3),
        (50.0, 1.006, 51.01),
    ],
)
def test_move_by_hand(before: float, change: float, after: float) -> None:
    assert move(before, change, RULES) == after


def test_threshold_is_not_missed_by_binary_noise() -> None:
    """Ten steps of 0.1 from 69 make 70, which plain floats miss."""
    emotion = plain = 69.0
    for _ in range(10):
        emotion, plain = move(emotion, 0.1, RULES), plain + 0.1
    assert plain != 70.0
    assert emotion == 70.0 and state_of(emotion) is EmotionState.A


@given(EMOTION, FINITE, st.floats(min_value=0.01, max_value=100.0))
def test_emotion_stays_in_range_and_within_the_clip(before: float, change: float, max_change: float) -> None:
    after = move(before, change, EmotionRules(start=30.0, max_change=max_change))
    assert 0.0 <= after <= 100.0
    assert abs(after - before) <= max_change + 1e-6
    assert abs(clip_change(change, max_change)) <= max_change


@pytest.mark.parametrize("change", [float("nan"), float("inf"), float("-inf")])
def test_a_change_that_is_no_number_is_refused(change: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        clip_change(change, 10.0)


@given(EMOTION, st.integers(min_value=1, max_value=20), st.integers(min_value=1, max_value=20))
def test_end_reason_agrees_with_state(emotion: float, num_replies: int, max_turns: int) -> None:
    reason = end_reason(emotion, rules=RULES, num_replies=num_replies, max_turns=max_turns)
    assert (reason is EndReason.EMOTION_HIGH) == (state_of(emotion) is EmotionState.S)
    assert (reason is EndReason.EMOTION_LOW) == (state_of(emotion) is EmotionState.F)
    assert (reason is None) == (10 <= emotion < 100 and num_replies < max_turns)


def test_success_on_the_last_turn_is_a_success() -> None:
    assert end_reason(100.0, rules=RULES, num_replies=8, max_turns=8) is EndReason.EMOTION_HIGH


def test_sage_ends_before_the_tenth_user_message_is_spoken() -> None:
    """The opening and eight answers are nine messages; the tenth would follow the ninth reply."""
    sage = PRESETS[Preset.sage].emotion
    assert end_reason(50.0, rules=sage, num_replies=8, max_turns=20) is None
    assert end_reason(50.0, rules=sage, num_replies=9, max_turns=20) is EndReason.MAX_TURNS
    assert end_reason(50.0, rules=sage, num_replies=8, max_turns=8) is EndReason.MAX_TURNS


def test_presets_and_knobs() -> None:
    assert {preset: PRESETS[preset].emotion.start for preset in Preset} == {
        Preset.sage: 40.0,
        Preset.rlver_vanilla: 30.0,
        Preset.rlver_challenging: 30.0,
    }
    assert {rules.emotion.max_change for rules in PRESETS.values()} == {10.0}
    vanilla, challenging = PRESETS[Preset.rlver_vanilla], PRESETS[Preset.rlver_challenging]
    assert challenging.acceptance < vanilla.acceptance
    assert challenging.expressiveness < vanilla.expressiveness
    assert challenging.hides_aim and not vanilla.hides_aim
    assert resolve_rules(SimulatorConfig()) == vanilla
    turned = resolve_rules(
        SimulatorConfig(
            preset=Preset.sage, start_emotion=0.0, max_change=5.0, acceptance=0.0, expressiveness=0.0
        )
    )
    assert (turned.emotion.start, turned.emotion.max_change, turned.acceptance, turned.expressiveness) == (
        0.0,
        5.0,
        0.0,
        0.0,
    )
    assert turned.emotion.max_user_messages == 10
