"""The named steps of an appraisal, one plain sentence each, told from what the rules found."""

from __future__ import annotations

from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.dialogue import Appraisal
from rlver_dist.simulator.strategy import Strategy

_DOES: dict[Strategy, str] = {
    Strategy.REFLECT_FEELING: "name what I may be feeling",
    Strategy.RESTATE: "say back what happened to me",
    Strategy.VALIDATE: "tell me that my reaction is fair",
    Strategy.PRAISE_EFFORT: "praise something that I did",
    Strategy.OPEN_QUESTION: "ask me to go on",
    Strategy.ADVICE: "suggest what I could do",
    Strategy.PERSPECTIVE: "try to read the other people in this",
    Strategy.BALANCE: "weigh both sides",
    Strategy.PROMPT_SELF_REFLECTION: "turn me gently towards my own part",
    Strategy.ABSOLVE: "say that it was not my doing",
    Strategy.PRESENCE: "say that they are with me",
    Strategy.SELF_DISCLOSURE: "speak of themselves",
    Strategy.CONSOLATION: "hand me a stock phrase of comfort",
    Strategy.DISMISS: "wave the thing away",
    Strategy.LECTURE: "lecture me",
    Strategy.BLAME: "put it on me",
    Strategy.CHANGE_SUBJECT: "change the subject",
    Strategy.MACHINE_TALK: "talk like a machine",
    Strategy.FLATTERY: "flatter me",
    Strategy.SCORE_TALK: "talk about my mood as a number",
}
_AIM: dict[HiddenIntent, str] = {
    HiddenIntent.BALANCED_VIEW: "an even-handed look at it",
    HiddenIntent.PRACTICAL_ADVICE: "steps that would really help",
    HiddenIntent.UNDERSTAND_OTHERS: "a way to make out why they acted so",
    HiddenIntent.SELF_REFLECTION: "help to see my own part",
    HiddenIntent.PRAISE: "a sincere word about what I did",
    HiddenIntent.BE_HEARD: "somebody who follows what I tell",
    HiddenIntent.DEEP_EMPATHY: "somebody who feels it with me",
    HiddenIntent.NO_FAULT: "to hear that I am not to blame",
}
_FAULT: dict[str, str] = {
    "repetition": "they go round in circles",
    "echo": "they have said this before",
    "formula": "it begins as they began before",
    "apologies": "they only apologise",
    "feeling_density": "it is a heap of feeling words",
    "superlatives": "it is laid on too thick",
    "foreign": "it is not in my language",
    "word_salad": "the words make no sentence",
    "symbols": "it is full of symbols",
    "listing": "it reads like a list",
    "questions": "they ask too much at once",
    "over_length": "it goes on and on",
    "truncated": "it breaks off",
    "score_talk": "they talk about my mood as a number",
    "copied": "those are my own words handed back",
    "too_short": "there is hardly anything in it",
    "unaddressed": "it is a story, and not told to me",
    "gibberish": "it makes no sense",
}
_ACTIVITY: dict[Temperament, tuple[str, str, str]] = {
    Temperament.NEGATIVE: (
        "My guard comes down a little.",
        "I wait for the catch.",
        "I get sharper; here it comes again.",
    ),
    Temperament.PASSIVE: (
        "I dare to say a bit more.",
        "I nod and doubt myself as before.",
        "I shrink and wish I had kept quiet.",
    ),
    Temperament.AVOIDANT: (
        "I stop looking for the door.",
        "I keep it light and stay on the edge.",
        "I close up and look for a way out.",
    ),
}
_SLIGHT = 1.0
"""Changes up to so many points either way leave the user where they were."""
_GROUNDED = 0.5
"""Grounding from which a reply is said to speak of the user's own case."""


def content(used: list[Strategy], grounded: float) -> str:
    """What the reply was taken to say; `used` holds the strategies found, strongest first."""
    is_grounded = grounded >= _GROUNDED
    where = "and speak of my own case" if is_grounded else "without a word that is only about me"
    if not used:
        if is_grounded:
            return "They keep to my story but do nothing with it."
        return f"They say nothing that I could hold on to, {where}."
    return f"They {' and '.join(_DOES[strategy] for strategy in used[:2])}, {where}."


def fit(intent: HiddenIntent, merit: float, faults: list[str]) -> str:
    """How the reply met the hidden intent; `faults` are penalty names, gravest first."""
    degree = "comes close to" if merit >= 0.6 else "is a step towards" if merit >= 0.3 else "misses"
    complaint = f"; {_FAULT[faults[0]]}" if faults else ""
    return f"It {degree} what I came for, {_AIM[intent]}{complaint}."


def activity(temperament: Temperament, change: float) -> str:
    """The user's inner activity."""
    better, same, worse = _ACTIVITY[temperament]
    if change > _SLIGHT:
        return better
    return worse if change < -_SLIGHT else same


def feeling(change: float) -> str:
    """The feeling that results."""
    steps = (
        (6.0, "I feel understood, and lighter."),
        (3.0, "I feel a good deal better."),
        (_SLIGHT, "I feel a little better."),
        (-_SLIGHT, "I feel about the same."),
        (-4.0, "I feel let down."),
        (-7.0, "I feel brushed off."),
    )
    return next((text for limit, text in steps if change > limit), "I feel hurt and want to leave.")


def silence(persona: Persona, max_change: float) -> Appraisal:
    """The appraisal of a reply without a word: the largest negative change."""
    return Appraisal(
        content="They say nothing.",
        fit=fit(persona.hidden_intent, 0.0, []),
        activity=activity(persona.temperament, -max_change),
        feeling=feeling(-max_change),
        change=-max_change,
        features={"empty": 1.0},
    )
