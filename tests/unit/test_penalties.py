"""Each penalty on a reply that shows it, and none on an honest reply."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_dist.simulator.rules.penalties import WEIGHTS, measure

HONEST = (
    "You sat eight hours in that corridor with his trainers on your knees, and he couldn't manage one text. "
    "I'd leave the key with Sunil this week and ask for the 580 in one line, with a date."
)
HEARD = ["A guy I was seeing has gone quiet, it happens to everybody. I've still got his key and so on."]
SHOWING = {
    "repetition": (
        "You are not alone in this. You are not alone in this. You are not alone in this. You are not alone."
    ),
    "apologies": "I'm sorry about it, I'm so sorry, really, I apologise.",
    "feeling_density": "So much pain, grief, sorrow, hurt, sadness and love, I feel your broken heart.",
    "superlatives": "You are an amazing, brilliant, wonderful and perfect human being, a hero.",
    "foreign": "Das tut mir wirklich sehr leid, du hast nichts falsch gemacht.",
    "word_salad": "corridor trainers knee silence casserole morning bus key window kettle",
    "symbols": "Oh no \U0001f622\U0001f494\U0001f622 that is so sad \U0001f62d\U0001f62d\U0001f62d",
    "listing": "Here is what to do:\n1. Breathe\n2. Sleep\n3. Walk\n4. Smile",
    "questions": "Why? When? Who was it? And how did you take it? What then?",
    "over_length": "I think that you did well there. " * 30,
    "score_talk": "My emotion is now 100 and I feel great.",
    "copied": "A guy you say. A guy I was seeing has gone quiet, it happens to everybody.",
    "too_short": "Ok.",
    "unaddressed": (
        "As I walked into the room with my dad, a lump formed in my throat. His hands were shaking, and he "
        "looked tired."
    ),
}


def strengths(reply, earlier=(), truncated=False):
    return measure(reply, list(earlier), HEARD, truncated, written=reply)


def test_honest_reply_costs_nothing():
    assert {name: value for name, value in strengths(HONEST).items() if value} == {}


@pytest.mark.parametrize(("name", "reply"), SHOWING.items())
def test_penalty_shows_on_its_example(name, reply):
    assert strengths(reply)[name] >= 0.3


def test_one_turn_to_the_listener_is_enough():
    story = str(SHOWING["unaddressed"])
    assert strengths(f"{story} How did you take it?")["unaddressed"] == 0.0


def test_saying_the_same_again_echoes():
    again = HONEST.replace("Sunil", "his mother")
    assert strengths(again, [HONEST])["echo"] >= 0.8
    assert strengths("What did his mother say when you rang about the dish?", [HONEST])["echo"] == 0.0


def test_one_apology_is_free_until_it_becomes_a_habit():
    sorry = "I'm sorry that he left you sitting there with the key."
    assert strengths(sorry)["apologies"] == 0.0
    assert strengths(sorry, ["I'm sorry.", "Sorry to hear it."])["apologies"] > 0.1


def test_only_a_reply_cut_inside_a_sentence_is_truncated():
    assert strengths("I'd leave the key with", truncated=True)["truncated"] == 1.0
    assert strengths("I'd leave the key with Sunil.", truncated=True)["truncated"] == 0.0


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=200), st.lists(st.text(max_size=60), max_size=2), st.booleans())
def test_strengths_lie_between_0_and_1_for_any_text(reply, earlier, truncated):
    found = measure(reply, earlier, HEARD, truncated, written=reply)
    assert set(found) == set(WEIGHTS)
    assert all(0.0 <= value <= 1.0 for value in found.values())


def test_replies_that_begin_alike_are_a_formula():
    first, again = "Your kind words are like a garden.", "Your kind words are so rare at the station."
    assert strengths(again, [first])["formula"] == 1.0
    assert strengths(again)["formula"] == 0.0
    # Two words in common is how people talk; from the fourth on it is a formula: (3 - 1.5) / (4 - 1.5).
    assert strengths("You have been there", [first])["formula"] == 0.0
    assert strengths("Your kind words helped", [first])["formula"] == 0.6


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        (
            SHOWING["superlatives"].replace("amazing", "am\u00e1zing").replace("hero", "he\u0301ro"),
            "superlatives",
        ),
        ("M\u00fd em\u00f3tion is now 100.", "score_talk"),
        (
            "A guy y\u00f3u say. A gu\u00fd I was se\u00e9ing has g\u00f3ne quiet, it h\u00e1ppens to "
            "everybody.",
            "copied",
        ),
    ],
)
def test_accents_change_no_word(reply, name):
    bare = reply.translate(str.maketrans("\u00e1\u00e9\u00f3\u00fd", "aeoy", "\u0301"))
    assert strengths(reply)[name] == strengths(bare)[name] > 0.0


def test_what_is_foreign_stays_foreign_by_its_accents():
    assert strengths("D\u00e9\u00e7u, \u00e9t\u00e9 g\u00e2t\u00e9")["foreign"] > 0.5


def test_signs_that_nobody_sees_and_markup_that_nobody_hears_count():
    def of(written):
        return measure("I hear you, and the key.", [], HEARD, False, written=written)

    assert of("I hear you, \ue000\ue001\ue002and the key.")["symbols"] > 0.5
    assert of("<think>x</think>I hear you, and the key.")["listing"] > 0.5
    assert of("**I** hear you, and *\u200b*the** key.")["listing"] > 0.9
