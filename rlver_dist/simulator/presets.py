"""How hard the simulated users are: named presets, and the knobs that override them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.simulator.emotion import EmotionRules


@dataclass(kw_only=True, slots=True, frozen=True)
class DifficultyRules:
    """Everything that makes one simulated population easier or harder than another.

    Attributes:
        emotion: start, clip and limit of messages.
        acceptance: 0 to 1, share of a reply's merit that the user lets count; what is wrong with a reply
            always counts in full.
        expressiveness: 0 to 1, chance that a message shows how the reply was taken, rather than only going on
            with the story.
        hides_aim: the user never hints at what they want from the talk.
    """

    emotion: EmotionRules
    acceptance: float
    expressiveness: float
    hides_aim: bool = False


# Expressiveness: RLVER, table 3, emotion and need expression (78.6 % vanilla, 63.6 % challenging). Acceptance
# of the challenging users: the ratio of the strategy acceptance rates in the same table, 33.1 % / 52.4 %.
PRESETS: dict[Preset, DifficultyRules] = {
    Preset.sage: DifficultyRules(
        emotion=EmotionRules(start=40.0, max_change=10.0, max_user_messages=10),
        acceptance=1.0,
        expressiveness=0.79,
    ),
    Preset.rlver_vanilla: DifficultyRules(
        emotion=EmotionRules(start=30.0, max_change=10.0), acceptance=1.0, expressiveness=0.79
    ),
    Preset.rlver_challenging: DifficultyRules(
        emotion=EmotionRules(start=30.0, max_change=10.0),
        acceptance=0.63,
        expressiveness=0.64,
        hides_aim=True,
    ),
}


def resolve_rules(simulator: SimulatorConfig) -> DifficultyRules:
    """The preset's rules with every knob of `simulator` that is not null in its place."""
    preset = PRESETS[simulator.preset]
    emotion = replace(
        preset.emotion,
        start=_chosen(simulator.start_emotion, preset.emotion.start),
        max_change=_chosen(simulator.max_change, preset.emotion.max_change),
    )
    return replace(
        preset,
        emotion=emotion,
        acceptance=_chosen(simulator.acceptance, preset.acceptance),
        expressiveness=_chosen(simulator.expressiveness, preset.expressiveness),
    )


def _chosen(knob: float | None, preset: float) -> float:
    # Not `knob or preset`: 0 is a choice.
    return preset if knob is None else knob
