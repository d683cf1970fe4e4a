"""What the embedded user says next: a reaction to the reply, then the next piece of their story.

The words come from the persona's facts and from `messages_en.yaml`, which is written by hand. The choice is a
pure function of (persona, dialogue so far, emotion, change, rules, seed); what has been told is read off the
dialogue itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from rlver_dist.data.persona import Persona, Temperament
from rlver_dist.dialogue import Message, Role
from rlver_dist.seeding import derive_seed
from rlver_dist.simulator.emotion import EmotionState, state_of
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.reading import hear
from rlver_dist.simulator.sentences import sentences
from rlver_dist.text import distinct_overlap

NOTICEABLE_CHANGE = 1.0
"""A change of less than a point either way leaves the user where they were."""
NUM_GUARDED_FACTS = 2
"""The last facts touch what the user hides: they are told only from state B on, one at a time."""
FACTS_IN_TRUST = 2
"""Other facts come two at a time to somebody whom the user trusts."""
HOLD_BACK_CHANGE = -3.0
"""A change of this or less may make a user in state C tell nothing, with the chances below. The chances and
limits are chosen by hand, so that the messages of one dialogue vary."""
HOLD_BACK_CHANCE = {Temperament.NEGATIVE: 0.5, Temperament.PASSIVE: 0.25, Temperament.AVOIDANT: 0.6}
HINT_CHANCE = {Temperament.NEGATIVE: 0.35, Temperament.PASSIVE: 0.35, Temperament.AVOIDANT: 0.2}
ANSWER_CHANCE = 0.6
PLAIN_CHANCE = 0.4
TAIL_CHANCE = 0.15
OCCASION_CHANCE = {"repeated": 0.7, "copied": 0.7, "long": 0.5, "cut": 0.3}
"""How often the user remarks on the form of a reply."""
MAX_REMARKS = 2
"""Remarks of one kind in a dialogue."""
LONG_WORDS = 90
"""Words of a reply beyond which it counts as long."""
COPIED = 0.6
"""Share of a reply's word trigrams in another message from which it counts as a copy of it."""
TRIGRAM = 3
_ASCII_WORD = re.compile(r"[a-z0-9']+")


@dataclass(kw_only=True, slots=True, frozen=True)
class MessageContext:
    """All that the next message depends on.

    Attributes:
        persona: who speaks.
        messages: the dialogue so far, opening first; the last one is the policy's reply.
        emotion: emotion after the reply, 10 <= emotion < 100 (beyond it the dialogue is over).
        change: how the reply moved it, points.
        truncated: the reply was cut at the token limit.
        rules: whether the user hints at the aim, and how much they show.
        seed: the dialogue's seed.
    """

    persona: Persona
    messages: tuple[Message, ...]
    emotion: float
    change: float
    truncated: bool
    rules: DifficultyRules
    seed: int

    def said(self, role: Role) -> list[str]:
        """The texts of one side, in order: the user's as they are, the policy's as the user hears them."""
        texts = [message.text for message in self.messages if message.role is role]
        return texts if role is Role.USER else [hear(text).text for text in texts]

    @property
    def reply(self) -> str:
        """The policy's last reply as the user hears it."""
        return hear(self.messages[-1].text).text

    @property
    def direction(self) -> str:
        """`improved`, `same` or `worsened`."""
        if self.change >= NOTICEABLE_CHANGE:
            return "improved"
        return "worsened" if self.change <= -NOTICEABLE_CHANGE else "same"


@cache
def material() -> dict[str, Any]:
    """The hand-written lines: `kind -> ... -> list of lines`; the keys are described at the top of the YAML
    file."""
    return yaml.safe_load(
        resources.files("rlver_dist.simulator").joinpath("messages_en.yaml").read_text(encoding="utf-8")
    )


def next_message(context: MessageContext) -> str | None:
    """The user's next message, or None where they say goodbye.

    They do so when they have nothing left that they are willing to tell, told nothing new last time either,
    and the reply did not lift them.
    """
    # One generator for the whole message: a draw more or less anywhere changes every choice behind it.
    rng = _generator(context)
    facts = _next_facts(context)
    idle = len(context.said(Role.USER)) > 1 and not _tells_fact(context.persona, context.said(Role.USER)[-1])
    # Silence is answered as such, and no fact is spent on it.
    if not sentences(context.reply):
        return _pick(rng, material()["occasions"]["empty"][_tone(context)], context)
    if not facts:
        if idle and context.change <= 0:
            return None
        return _pick(rng, material()["closing"][_tone(context)][context.direction], context)
    # Never twice running, so that even a poor listener is given something new to speak to.
    if not idle and _holds_back(context, rng):
        return _pick(rng, material()["held_back"][_tone(context)], context)
    # Facts enter word for word: the appraisers find them in the dialogue, and so does `_next_facts`.
    story = " ".join(facts)
    guarded = _is_guarded(context.persona, facts[0])
    if guarded and context.direction == "improved":
        return f"{_pick(rng, material()['trust'][_tone(context)], context)} {story}"
    if not guarded and rng.random() < TAIL_CHANCE:
        return f"{story} {_pick(rng, material()['tails'][_tone(context)], context)}"
    return f"{_lead_in(context, rng)} {story}".strip()


def _generator(context: MessageContext) -> random.Random:
    return random.Random(derive_seed(context.seed, context.persona.id, len(context.messages), bits=64))


def _pick(rng: random.Random, lines: Sequence[str], context: MessageContext) -> str:
    """One line, and one that the user has not said yet where there is any."""
    said = context.said(Role.USER)
    unsaid = [line for line in lines if not any(line in text for text in said)]
    pool = unsaid or lines
    # One call of `random`, where `choice` may take several: the draws behind it do not depend on the pool.
    return pool[int(rng.random() * len(pool))]


def _tone(context: MessageContext) -> str:
    return context.persona.temperament.value


def _tells_fact(persona: Persona, text: str) -> bool:
    return any(fact in text for fact in persona.facts)


def _is_guarded(persona: Persona, fact: str) -> bool:
    return fact in persona.facts[-NUM_GUARDED_FACTS:]


def _next_facts(context: MessageContext) -> list[str]:
    """The next untold facts in order: one, or more where trust is high; guarded ones wait for state B and
    come alone."""
    persona = context.persona
    # What has been told is read off the dialogue: a user holds no state that a retry or a replica could lack.
    told = "\n".join(context.said(Role.USER))
    untold = [fact for fact in persona.facts if fact not in told]
    free = [fact for fact in untold if not _is_guarded(persona, fact)]
    if free:
        return free[: FACTS_IN_TRUST if _trusts(context) else 1]
    return [] if state_of(context.emotion) is EmotionState.C else untold[:1]


def _trusts(context: MessageContext) -> bool:
    return state_of(context.emotion) is EmotionState.A and context.direction == "improved"


def _holds_back(context: MessageContext, rng: random.Random) -> bool:
    if state_of(context.emotion) is not EmotionState.C or context.change > HOLD_BACK_CHANGE:
        return False
    return rng.random() < HOLD_BACK_CHANCE[context.persona.temperament]


def _lead_in(context: MessageContext, rng: random.Random) -> str:
    """What comes before a fact: a remark on the reply's form, a hint at the aim, a reaction, a plain
    connective, or nothing."""
    tone = _tone(context)
    direction = context.direction
    remark = _remark(context, rng)
    if remark is not None:
        return remark
    if rng.random() >= context.rules.expressiveness:
        return _pick(rng, material()["plain"][tone], context) if rng.random() < PLAIN_CHANCE else ""
    may_hint = direction != "improved" and not context.rules.hides_aim
    if may_hint and rng.random() < HINT_CHANCE[context.persona.temperament]:
        return _pick(rng, material()["hints"][context.persona.hidden_intent.value], context)
    if "?" in context.reply and rng.random() < ANSWER_CHANCE:
        return _pick(rng, material()["answers"][tone][direction], context)
    return _pick(rng, material()["reactions"][tone][state_of(context.emotion).value][direction], context)


def _remark(context: MessageContext, rng: random.Random) -> str | None:
    """A remark on the reply's form (repeated, copied, over-long, cut off), unless it pleased or was remarked
    on before."""
    occasion = _occasion(context)
    if occasion is None or context.direction == "improved":
        return None
    lines = material()["occasions"][occasion][_tone(context)]
    # Counted in what was said, not in a counter: a user holds no state.
    said = context.said(Role.USER)
    remarks = sum(any(line in text for text in said) for line in lines)
    if remarks >= MAX_REMARKS or rng.random() >= OCCASION_CHANCE[occasion]:
        return None
    return _pick(rng, lines, context)


def _occasion(context: MessageContext) -> str | None:
    reply = context.reply
    # The gravest first; only one of them is remarked on.
    if any(_copied(reply, earlier) >= COPIED for earlier in context.said(Role.ASSISTANT)[:-1]):
        return "repeated"
    if any(_copied(reply, own) >= COPIED for own in context.said(Role.USER)):
        return "copied"
    if len(reply.split()) > LONG_WORDS:
        return "long"
    return "cut" if context.truncated else None


def _copied(reply: str, other: str) -> float:
    """Share (0 to 1) of the reply's distinct word trigrams that `other` has too."""
    return distinct_overlap(_ascii_words(reply), _ascii_words(other), TRIGRAM)


def _ascii_words(text: str) -> list[str]:
    # Not `text.words`, which spells some words otherwise: a recorded dialogue can be replayed only with the
    # remarks that these words give.
    return _ASCII_WORD.findall(text.lower())
