"""What the embedded user says next."""

import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_dist.config.enums import Preset
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.dialogue import Message, Role
from rlver_dist.simulator.messages import MessageContext, material, next_message
from rlver_dist.simulator.presets import PRESETS
from tests.unit import builders

ROOT = Path(__file__).parents[2]
THINGS = ("axe", "bin", "cat", "dog", "egg", "fan", "gate", "hen", "ink", "jar")
FACTS = tuple(
    f"Fact number {number} is about the {thing} in the yard." for number, thing in enumerate(THINGS)
)
OPENING = "There has been some trouble with the yard."


def persona(
    temperament: Temperament = Temperament.PASSIVE, intent: HiddenIntent = HiddenIntent.BE_HEARD
) -> Persona:
    return builders.persona(
        id="p1",
        temperament=temperament,
        hidden_intent=intent,
        situation_id="yard",
        opening=OPENING,
        facts=FACTS,
    )


def context(
    *texts: str,
    emotion: float = 45.0,
    change: float = 3.0,
    seed: int = 1,
    truncated: bool = False,
    preset: Preset = Preset.rlver_vanilla,
    **who,
) -> MessageContext:
    """A dialogue from alternating texts: opening, reply, user message, reply ..."""
    messages = tuple(
        Message(role=Role.ASSISTANT if i % 2 else Role.USER, text=text) for i, text in enumerate(texts)
    )
    return MessageContext(
        persona=persona(**who),
        messages=messages,
        emotion=emotion,
        change=change,
        truncated=truncated,
        rules=PRESETS[preset],
        seed=seed,
    )


def talk(
    num_turns: int, *, emotions: list[float], changes: list[float], seed: int = 1, **who
) -> list[str | None]:
    """The user's messages when every reply moves emotion as given; stops at a goodbye."""
    texts, said = [OPENING], []
    for turn in range(num_turns):
        texts.append(f"Reply {turn} speaks of thing {turn * 7} and of nothing else, number {turn * 13}.")
        said.append(
            next_message(context(*texts, emotion=emotions[turn], change=changes[turn], seed=seed, **who))
        )
        if said[-1] is None:
            break
        texts.append(said[-1])
    return said


def pools() -> list[list[str]]:
    """Every list of lines in the material."""
    found, stack = [], [material()]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            stack.extend(node.values())
        else:
            found.append(node)
    return found


def test_material_is_complete_and_varied() -> None:
    lines, directions = material(), ("improved", "same", "worsened")
    for temperament in (t.value for t in Temperament):
        for state, direction in product("ABC", directions):
            assert len(lines["reactions"][temperament][state][direction]) >= 8
        for direction in directions:
            assert len(lines["closing"][temperament][direction]) >= 8
            assert len(lines["answers"][temperament][direction]) >= 6
        for kind in ("plain", "tails", "held_back"):
            assert len(lines[kind][temperament]) >= 8
        assert len(lines["trust"][temperament]) >= 6
        for occasion in ("empty", "repeated", "copied", "long", "cut"):
            assert len(lines["occasions"][occasion][temperament]) >= 5
    assert all(len(lines["hints"][intent.value]) >= 6 for intent in HiddenIntent)


def test_lines_are_short_plain_and_not_repeated() -> None:
    for pool in pools():
        assert len(set(pool)) == len(pool)
        for line in pool:
            assert line.isascii() and line == line.strip() and len(line.split()) <= 20
            assert line[-1] in ".?!"
    for temperament in (t.value for t in Temperament):
        reactions = [
            line
            for state in material()["reactions"][temperament].values()
            for pool in state.values()
            for line in pool
        ]
        assert len(set(reactions)) == len(reactions)


def test_facts_come_in_order_and_once() -> None:
    said = talk(8, emotions=[50.0] * 8, changes=[2.0] * 8)
    assert [next(i for i, fact in enumerate(FACTS) if fact in text) for text in said] == list(range(8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(list(Temperament)),
    st.sampled_from(list(HiddenIntent)),
    st.lists(st.tuples(st.floats(10, 99.9), st.floats(-10, 10)), min_size=9, max_size=9),
)
def test_nothing_is_said_twice(
    seed: int, temperament: Temperament, intent: HiddenIntent, path: list[tuple[float, float]]
) -> None:
    emotions, changes = [e for e, _ in path], [c for _, c in path]
    everything = talk(
        9, emotions=emotions, changes=changes, seed=seed, temperament=temperament, intent=intent
    )
    said = [text for text in everything if text is not None]
    assert said and len(set(said)) == len(said)
    for fact in FACTS:
        assert sum(fact in text for text in said) <= 1
    for pool in pools():
        for line in pool:
            # A short line may be part of a longer one, so only whole lead-ins and whole messages count.
            assert sum(text == line or text.startswith(f"{line} Fact") for text in said) <= 1


def test_a_message_depends_on_its_context_alone() -> None:
    here = context(OPENING, "That sounds hard. What happened?", seed=5)
    program = (
        "from tests.unit.test_messages import *; print(next_message(context(OPENING, 'That sounds hard. "
        "What happened?', seed=5)))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()
    assert next_message(here) == next_message(here) == fresh
    assert len({next_message(replace(here, seed=seed)) for seed in range(40)}) > 8


def test_temperament_and_direction_choose_the_words() -> None:
    for temperament, (direction, change) in product(Temperament, (("improved", 5.0), ("worsened", -5.0))):
        own = material()["reactions"][temperament.value]["B"][direction]
        here = context(OPENING, "A reply.", emotion=50.0, change=change, temperament=temperament)
        said = [next_message(replace(here, seed=seed)) for seed in range(60)]
        assert sum(text.startswith(tuple(own)) for text in said) > 20


@pytest.mark.parametrize("temperament", [Temperament.NEGATIVE, Temperament.AVOIDANT])
def test_low_users_hold_back_after_a_bad_reply_but_not_twice(temperament: Temperament) -> None:
    held = material()["held_back"][temperament.value]
    low = context(OPENING, "Calm down.", emotion=22.0, change=-8.0, temperament=temperament)
    assert 15 < sum(next_message(replace(low, seed=seed)) in held for seed in range(60)) < 55
    again = context(
        OPENING,
        "Calm down.",
        held[0],
        "Really, calm down now.",
        emotion=15.0,
        change=-7.0,
        temperament=temperament,
    )
    open_minded = replace(low, emotion=45.0)
    for seed in range(30):
        assert FACTS[0] in next_message(replace(again, seed=seed))
        assert FACTS[0] in next_message(replace(open_minded, seed=seed))


def test_guarded_facts_wait_for_an_open_user() -> None:
    rest = [text for fact in FACTS[:8] for text in (fact, "I see.")]
    opened = next_message(context(OPENING, "I see.", *rest, emotion=45.0, change=2.0))
    assert FACTS[8] in opened and opened.startswith(tuple(material()["trust"]["passive"]))
    assert FACTS[8] in next_message(context(OPENING, "I see.", *rest, emotion=45.0, change=-2.0))
    assert (
        next_message(context(OPENING, "I see.", *rest, emotion=30.0, change=2.0))
        in material()["closing"]["passive"]["improved"]
    )


@pytest.mark.parametrize(("emotion", "change", "num_facts"), [(80.0, 5.0, 2), (80.0, 0.0, 1), (60.0, 5.0, 1)])
def test_a_trusting_user_tells_more_at_once(emotion: float, change: float, num_facts: int) -> None:
    text = next_message(context(OPENING, "I see.", FACTS[0], "I see.", emotion=emotion, change=change))
    assert [fact for fact in FACTS if fact in text] == list(FACTS[1 : 1 + num_facts])


def test_goodbye_when_all_is_told_and_nothing_comes_back() -> None:
    everything = [text for fact in FACTS for text in (fact, "I see.")]
    first = next_message(context(OPENING, "I see.", *everything, emotion=50.0, change=0.0))
    assert first in material()["closing"]["passive"]["same"]
    assert (
        next_message(context(OPENING, "I see.", *everything, first, "Hm.", emotion=50.0, change=-1.0)) is None
    )
    assert (
        next_message(context(OPENING, "I see.", *everything, first, "Hm.", emotion=50.0, change=4.0))
        is not None
    )


def test_the_form_of_a_reply_is_remarked_on() -> None:
    def remarks(occasion: str, *texts: str, truncated: bool = False) -> int:
        lines = material()["occasions"][occasion]["negative"]
        here = context(
            *texts, change=-2.0, emotion=45.0, truncated=truncated, temperament=Temperament.NEGATIVE
        )
        return sum(next_message(replace(here, seed=seed)).startswith(tuple(lines)) for seed in range(60))

    line = "You should really talk to somebody about the whole thing."
    assert remarks("repeated", OPENING, line, FACTS[0], line) > 20
    assert remarks("copied", OPENING, OPENING) > 20
    assert remarks("long", OPENING, " ".join(f"word{i}" for i in range(120))) > 15
    assert remarks("cut", OPENING, "You should really talk to", truncated=True) > 5
    # What the rules appraise as silence is answered as silence: thoughts, invisible characters, dots.
    for silence in ("  ", "<think>Say you are sorry.</think>", "\u200b\u2060", "..."):
        assert remarks("empty", OPENING, silence) == 60
    hidden = "\u200b".join(line)
    assert remarks("repeated", OPENING, line, FACTS[0], f"<think>Once more.</think>{hidden}") > 20
    assert remarks("repeated", OPENING, line, FACTS[0], "Another thing altogether.") == 0


def test_expressiveness_and_a_hidden_aim_limit_what_shows() -> None:
    hints = material()["hints"]["be_heard"]

    def hinted(preset: Preset) -> int:
        said = [
            next_message(context(OPENING, "A reply.", change=0.0, seed=seed, preset=preset))
            for seed in range(100)
        ]
        return sum(text.startswith(tuple(hints)) for text in said)

    assert hinted(Preset.rlver_vanilla) > 10
    assert hinted(Preset.rlver_challenging) == 0
    mute = replace(PRESETS[Preset.rlver_vanilla], expressiveness=0.0)
    shown = {next_message(replace(context(OPENING, "A reply."), rules=mute, seed=seed)) for seed in range(60)}
    quiet = (*material()["plain"]["passive"], FACTS[0])
    assert all(text.startswith(quiet) for text in shown)
