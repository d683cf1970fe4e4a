"""The arithmetic of the user's emotion: limits, states and ends.

Emotion is a number from 0 to 100 that blends engagement and mood. Every backend, the ledger's verification
and the tests derive it with the functions here and nowhere else (SAGE, arXiv:2505.02847, section 2.3 and
appendix E; RLVER, arXiv:2507.03112, appendix E.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from rlver_dist.dialogue import MAX_EMOTION, MIN_EMOTION, EndReason

CEILING = MAX_EMOTION
"""Emotion at which a user leaves content (a success)."""
FLOOR = 10.0
"""Emotion below which a user gives up (a failure)."""
# Sums of numbers with two digits, such as 30.1 + 0.2, carry noise in the last binary digits, and a threshold
# must not depend on it.
EMOTION_DIGITS = 6
CHANGE_DIGITS = 2


class EmotionState(str, Enum):
    """What the number means to the user; intervals are half-open, so that every real number has one state."""

    S = "S"
    """[100, 100]: content, leaves."""
    A = "A"
    """[70, 100): warm."""
    B = "B"
    """[40, 70): open, undecided."""
    C = "C"
    """[10, 40): low, close to giving up."""
    F = "F"
    """[0, 10): gives up."""


@dataclass(kw_only=True, slots=True, frozen=True)
class EmotionRules:
    """How emotion moves, and when a dialogue ends for another reason than `CEILING` and `FLOOR`.

    Attributes:
        start: emotion at the opening, in points (0 to 100).
        max_change: largest change a turn in points, either way.
        max_user_messages: user messages after which the dialogue is over, whatever the request's turn limit;
            None leaves it to the request. The last of them is not spoken, since no reply to it is appraised
            (the original's SAGE/test_npc.py).
    """

    start: float
    max_change: float
    max_user_messages: int | None = None


def clip_change(change: float, max_change: float) -> float:
    """`change` rounded to two digits and limited to [-max_change, max_change] points.

    Rounded first, so that a limit with more digits than two is kept exactly.

    Raises:
        ValueError: `change` is not a finite number.
    """
    if not math.isfinite(change):
        raise ValueError(f"an emotion change must be finite, not {change}")
    return min(max(round(change, CHANGE_DIGITS), -max_change), max_change)


def move(emotion: float, change: float, rules: EmotionRules) -> float:
    """Emotion after a change in points: clipped by `rules`, kept in [0, 100]."""
    moved = emotion + clip_change(change, rules.max_change)
    return min(max(round(moved, EMOTION_DIGITS), MIN_EMOTION), MAX_EMOTION)


def state_of(emotion: float) -> EmotionState:
    """The state that an emotion from 0 to 100 belongs to."""
    for state, bottom in (
        (EmotionState.S, CEILING),
        (EmotionState.A, 70),
        (EmotionState.B, 40),
        (EmotionState.C, FLOOR),
    ):
        if emotion >= bottom:
            return state
    return EmotionState.F


def end_reason(emotion: float, *, rules: EmotionRules, num_replies: int, max_turns: int) -> EndReason | None:
    """Why the dialogue ends after `num_replies` appraised replies at `emotion`; None while it goes on.

    The user's own reasons come before the turn limit: a last reply that lifts emotion to the ceiling is a
    success.
    """
    if emotion >= CEILING:
        return EndReason.EMOTION_HIGH
    if emotion < FLOOR:
        return EndReason.EMOTION_LOW
    if num_replies >= max_turns:
        return EndReason.MAX_TURNS
    if rules.max_user_messages is not None and num_replies + 1 >= rules.max_user_messages:
        return EndReason.MAX_TURNS
    return None
