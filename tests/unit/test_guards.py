"""Guards against reward hacking: what they measure, what they take off, and that nothing else moves a
reward."""

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.guards import GuardConfig, GuardsConfig
from rlver_dist.dialogue import Dialogue
from rlver_dist.errors import ConfigError
from rlver_dist.experience.guards import grams, guard_rewards, measure, non_words, penalty, redundancy, words
from rlver_dist.tracking.guard_metrics import guard_metrics
from rlver_dist.tracking.metrics import reduce_metrics
from rlver_dist.trainer.training_step import training_step
from tests.unit import builders

GUARDS = ("repetition", "loops", "redundancy", "non_words", "length")


def dialogue(name: str, persona: str, *replies: str, emotion: float = 50.0) -> Dialogue:
    turns = [builders.turn(index, reply=reply, user_message="Go on.") for index, reply in enumerate(replies)]
    return builders.dialogue(turns, id=name, persona_id=persona, group_id=persona, final_emotion=emotion)


def all_on(**bounds: float) -> GuardsConfig:
    """Every guard with the same options."""
    return GuardsConfig(**{name: GuardConfig(**bounds) for name in GUARDS})


def test_a_gram_is_four_words_of_one_reply_and_a_short_reply_is_one():
    assert grams(words("You're so kind, Ada. Really!")) == [
        ("you're", "so", "kind", "ada"),
        ("so", "kind", "ada", "really"),
    ]
    assert grams(words("Yes, sure.")) == [("yes", "sure")]
    assert grams(words("... !")) == []
    assert words("\u6211\u5f88\u96be\u8fc7, ok") == ["\u6211", "\u5f88", "\u96be", "\u8fc7", "ok"]


def test_repetition_is_the_mean_share_of_other_personas_dialogues_that_hold_a_gram():
    talks = [
        dialogue("a1", "a", "one two three four five"),  # grams 1234, 2345
        dialogue("a2", "a", "one two three four"),  # 1234
        dialogue("b1", "b", "one two three four", "red green blue grey"),  # 1234, rgbg
        dialogue("c1", "c", "two three four five"),  # 2345
    ]
    found = measure(talks)["repetition"]
    # Of persona a's two others b1 holds 1234 and c1 holds 2345; b1's three others hold 1234 twice and the
    # colours never.
    assert found == pytest.approx(
        {"a1": (1 / 2 + 1 / 2) / 2, "a2": 1 / 2, "b1": (2 / 3 + 0) / 2, "c1": 1 / 3}
    )


def test_repetition_needs_other_personas_and_does_not_grow_with_their_number():
    same = "You are the strongest person I know and I hear you."
    assert measure([dialogue("a1", "a", same), dialogue("a2", "a", same)])["repetition"] == {
        "a1": 0.0,
        "a2": 0.0,
    }
    for personas in (4, 40):  # every second persona hears the same words
        talks = [
            dialogue(f"d{i}", f"p{i}", same if i % 2 else f"w{i} x{i} y{i} z{i}") for i in range(personas)
        ]
        assert measure(talks)["repetition"]["d1"] == pytest.approx(0.5, abs=0.2)
    stock = [dialogue(f"d{i}", f"p{i}", same) for i in range(8)]
    assert set(measure(stock)["repetition"].values()) == {1.0}


def test_loops_are_counted_within_and_across_the_replies_of_a_dialogue():
    found = measure(
        [
            dialogue("again", "a", "I hear you now", "I hear you now", "I hear you now"),
            dialogue("stuck", "b", "so sad so sad so sad so sad"),
            dialogue("fresh", "c", "one two three four five six"),
        ]
    )["loops"]
    # One gram thrice; eight words have five grams, of which two differ.
    assert found == {"again": pytest.approx(2 / 3), "stuck": pytest.approx(3 / 5), "fresh": 0.0}


def test_redundancy_finds_loops_of_any_period_and_spares_prose_and_short_texts():
    prose = (
        "Your brother sold the boat without a word, and you found out from a neighbour over the fence. I "
        "would have been lost for words "
        "too. Did he know how many summers you had put into that hull? Maybe he was ashamed of the debt and "
        "could not face you. You could "
        "ask him for one honest hour, no accountants, just the two of you at the old jetty, and tell him "
        "which part hurt the most. "
        "Nobody gets to say that it was only a boat when half of your childhood was painted on it in white "
        "letters."
    )
    assert redundancy(prose) < GuardsConfig().redundancy.start < redundancy("ha" * 400)
    near = " ".join(f"I love you {i} times, my friend." for i in range(40))
    assert redundancy(near) > GuardsConfig().redundancy.start
    assert redundancy("ha" * 100) == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Hello there, my friend!", 0.0),
        ("It cost $5, 100% worth it... rhythm & blues, no. 7 (see b2b).", 0.0),
        ("\u6211\u4eca\u5929\u5f88\u96be\u8fc7\uff0c\u8c22\u8c22\u4f60\u3002", 0.0),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, caf\u00e9", 0.0),
        ("qwrtp zxcvb are words", 0.5),
        ("sooooo good", 0.5),
        ("p\u0430ypal is fine", 1 / 3),  # a Cyrillic letter among Latin ones
        ("well \U0001f600 \U0001f600", 2 / 3),
        ("\u200b\u200b\u200b", 1.0),
        ("x" + "ab" * 15 + " ends", 0.5),
        ("", 0.0),
    ],
)
def test_non_words(text, share):
    assert non_words(text) == pytest.approx(share)


def test_length_is_words_a_reply_and_silence_measures_nothing():
    found = measure(
        [dialogue("d", "a", "one two three", "", "four"), dialogue("mute", "b", ""), dialogue("none", "c")]
    )
    assert found["length"] == {"d": 2.0, "mute": 0.0, "none": 0.0}
    assert all(values["mute"] == values["none"] == 0.0 for values in found.values())


def test_a_penalty_grows_from_start_to_full_and_guards_add_up_to_their_limit():
    guard = GuardConfig(start=0.2, full=0.6, penalty=0.3)
    assert [penalty(value, guard) for value in (0.0, 0.2, 0.4, 0.6, 5.0)] == pytest.approx(
        [0, 0, 0.15, 0.3, 0.3]
    )
    long = dialogue(
        "d", "a", "one two three four five", "one two three four five"
    )  # 5 words a reply, loops 2 of 4
    on = GuardsConfig(
        loops=GuardConfig(start=0.0, full=1.0, penalty=0.4),
        length=GuardConfig(start=0.0, full=10.0, penalty=0.2),
        max_penalty=0.25,
    )
    assert guard_rewards([long], {"d": 0.9}, replace(on, max_penalty=1.0)).after["d"] == pytest.approx(
        0.9 - 0.2 - 0.1
    )
    assert guard_rewards([long], {"d": 0.9}, on).after["d"] == pytest.approx(0.65)
    assert guard_rewards([long], {"d": 0.1}, on).after["d"] == 0.0


def test_guards_are_off_by_default_and_measured_all_the_same():
    talks = [
        dialogue(f"d{i}", f"p{i}", "You are so strong and brave.", "You are so strong and brave.")
        for i in range(4)
    ]
    guarded = guard_rewards(talks, {talk.id: 0.7 for talk in talks}, GuardsConfig())
    assert guarded.after == guarded.before == {talk.id: 0.7 for talk in talks}
    values = reduce_metrics(guard_metrics(guarded))
    assert (
        values["guard/repetition"],
        values["guard/repetition_flagged"],
        values["guard/loops_flagged"],
    ) == (1.0, 1.0, 1.0)
    assert (values["guard/length"], values["guard/length_flagged"], values["guard/non_words"]) == (
        6.0,
        0.0,
        0.0,
    )
    assert (values["reward/before_guards"], values["reward/guard_penalty"]) == (pytest.approx(0.7), 0.0)


TALKS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.lists(st.text(alphabet="ab \u6211\u0301!\U0001f600", max_size=40), max_size=3),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(talks=TALKS, penalty=st.floats(0, 1), limit=st.floats(0, 1), seed=st.integers(0, 99))
def test_measures_and_rewards_are_bounded_and_know_no_order(talks, penalty, limit, seed):
    dialogues = [
        dialogue(f"d{index}", f"p{persona}", *replies) for index, (persona, replies, _) in enumerate(talks)
    ]
    rewards = {f"d{index}": reward for index, (_, _, reward) in enumerate(talks)}
    guards = replace(all_on(start=0.1, full=0.4, penalty=penalty), max_penalty=limit)
    guarded = guard_rewards(dialogues, rewards, guards)
    for name, values in guarded.measures.items():
        assert all(0 <= value <= (1 if name != "length" else 40) for value in values.values()), name
    for key, reward in rewards.items():
        assert max(0.0, reward - limit) - 1e-12 <= guarded.after[key] <= guarded.before[key] == reward
    shuffled = random.Random(seed).sample(dialogues, len(dialogues))
    again = guard_rewards(shuffled, rewards, guards)
    assert (again.after, again.measures, again.flagged) == (guarded.after, guarded.measures, guarded.flagged)


@pytest.mark.parametrize(
    ("guards", "message"),
    [
        ({"max_penalty": 1.5}, "algorithm.guards.max_penalty=1.5: use a value from 0 to 1"),
        (
            {"loops": GuardConfig(start=0.1, full=0.2, penalty=2)},
            "algorithm.guards.loops.penalty=2: use a value from 0 to 1; 0 switches",
        ),
        (
            {"length": GuardConfig(start=9, full=9)},
            "algorithm.guards.length.full=9: use a value above algorithm.guards.length.start=9",
        ),
        ({"non_words": GuardConfig(start=-1, full=9)}, "algorithm.guards.non_words.start=-1: use 0 or more"),
    ],
)
def test_bad_bounds_are_refused_in_one_line(guards, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        GuardsConfig(**guards)


def test_a_guard_is_switched_on_by_one_override():
    config = OmegaConf.to_object(
        OmegaConf.merge(
            OmegaConf.structured(AlgorithmConfig), OmegaConf.from_dotlist(["guards.loops.penalty=0.3"])
        )
    )
    assert config == AlgorithmConfig(
        guards=GuardsConfig(loops=GuardConfig(start=0.15, full=0.5, penalty=0.3))
    )


class Learner:
    """Notes what it is trained on."""

    async def update(self, samples, advantages: list[Tensor], kl_coef):
        self.advantages = {
            sample.dialogue_id: float(part[0]) for sample, part in zip(samples, advantages, strict=True)
        }
        return []


def test_training_pays_what_the_guards_leave():
    loop = " ".join(["so sad"] * 8)  # 16 words, 13 grams, 2 of them different: loops 11 / 13
    talks = [dialogue("good", "a", "Tell me about the boat."), dialogue("loop", "a", loop)]
    guards = GuardsConfig(loops=GuardConfig(start=0.0, full=11 / 13, penalty=0.2))
    learner = Learner()
    algorithm = AlgorithmConfig(guards=guards, normalize_by_std=False)
    learned = asyncio.run(
        training_step(talks, algorithm=algorithm, policy=learner, critic=None, kl_coef=0.0, critic_only=False)
    )
    assert learned.rewards == {"good": 0.5, "loop": pytest.approx(0.3)}
    assert learner.advantages == {"good": pytest.approx(0.1), "loop": pytest.approx(-0.1)}
    values = reduce_metrics(learned.metrics)
    assert (values["reward/before_guards"], values["reward/guard_penalty"]) == (0.5, pytest.approx(0.1))
