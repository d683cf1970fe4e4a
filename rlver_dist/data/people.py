"""The people of the bank: names, traits and person sheets, put together from hand-written material
(`names.yaml`, `people.yaml`).

Everything is dealt from shuffled decks, so that each piece is used about equally often, and in an order that
depends on the seed alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Generic, TypeVar

import yaml

from rlver_dist.data.persona import Temperament
from rlver_dist.data.situations import Situation
from rlver_dist.errors import DataError

T = TypeVar("T")


class Deck(Generic[T]):
    """Cards dealt in a shuffled order and shuffled again once no card that fits is left."""

    def __init__(self, cards: list[T], rng: random.Random) -> None:
        self._cards = list(cards)
        self._rng = rng
        self._left: list[T] = []

    def draw(self, fits: Callable[[T], bool] = lambda card: True) -> T | None:
        """The next card that fits; None where not even a full deck has one."""
        # What is left comes first, refilled or not: an old card that did not fit must not wait for ever.
        for refill in (False, True):
            if refill:
                self._left = self._left + self._rng.sample(self._cards, len(self._cards))
            for position, card in enumerate(self._left):
                if fits(card):
                    return self._left.pop(position)
        return None


@dataclass(kw_only=True, slots=True, frozen=True)
class Piece:
    """A sentence of a sheet, with the ages (years, inclusive) that it fits and the situations that it does
    not."""

    text: str
    ages: Sequence[int] = (0, 120)
    not_with: Sequence[str] = ()

    def fits(self, age: int, situation: Situation) -> bool:
        """True where a user of `age` in `situation` may have it."""
        return self.ages[0] <= age <= self.ages[1] and situation.id not in self.not_with


@dataclass(kw_only=True, slots=True, frozen=True)
class Person:
    """Who a user is: name, three traits, and the person sheet in the second person."""

    name: str
    traits: tuple[str, ...]
    profile: str


class People:
    """Deals people who fit a situation and a temperament; no name is dealt twice."""

    def __init__(self, seed: int) -> None:
        material = _load("people.yaml")
        rng = random.Random(f"people:{seed}")
        names = [(given, tuple(group["family"])) for group in _load("names.yaml") for given in group["given"]]
        # All decks share one generator, so the order of the lines below is a part of what the seed means.
        self._rng = rng
        self._names = rng.sample(names, len(names))
        self._introductions: Deck[str] = Deck(material["introductions"], rng)
        self._hobbies = _piece_deck(material["hobbies"], rng)
        self._habits = _piece_deck(material["habits"], rng)
        self._pools: dict[Temperament, Deck[str]] = {
            kind: Deck(material["trait_pools"][kind.value], rng) for kind in Temperament
        }
        self._opposites = [frozenset(pair) for pair in material["opposites"]]
        self._traits = {trait: _piece_deck(items, rng) for trait, items in material["traits"].items()}
        self._manners = {kind: _piece_deck(material["manners"][kind.value], rng) for kind in Temperament}
        self._reactions: dict[Temperament, Deck[str]] = {
            kind: Deck(material["reactions"][kind.value], rng) for kind in Temperament
        }
        self._sheets: Deck[str] = Deck(material["sheets"], rng)

    def person(self, situation: Situation, temperament: Temperament) -> Person:
        """A new person of an age and an occupation that the situation allows."""
        given, name = self._name(situation)
        age = self._rng.randint(*situation.ages)
        traits = self._three_traits(temperament)
        introduction = _drawn(self._introductions).format(
            name=name, given=given, age=age, job=with_article(self._rng.choice(situation.occupations))
        )
        decks = {
            "hobby": self._hobbies,
            "hobby_2": self._hobbies,
            "habit": self._habits,
            "manner": self._manners[temperament],
        }
        decks |= {f"trait_{number}": self._traits[trait] for number, trait in enumerate(traits, start=1)}
        pieces = {
            slot: _drawn(deck, lambda piece: piece.fits(age, situation)).text for slot, deck in decks.items()
        }
        profile = _drawn(self._sheets).format(introduction=introduction, **pieces)
        return Person(name=name, traits=traits, profile=profile)

    def reaction(self, temperament: Temperament) -> str:
        """How somebody of that temperament takes what the other says."""
        return _drawn(self._reactions[temperament])

    def _name(self, situation: Situation) -> tuple[str, str]:
        """A given and a full name that nobody in the situation bears."""
        # A user called like somebody in their own story would confuse every reader of the scene.
        taken = set(re.findall(r"\w+", situation.text()))
        for position, (given, families) in enumerate(self._names):
            free = [family for family in families if family not in taken]
            if given not in taken and free:
                del self._names[position]
                return given, f"{given} {self._rng.choice(free)}"
        raise DataError(f"names.yaml: no unused name is left for {situation.id}; add given names")

    def _three_traits(self, temperament: Temperament) -> tuple[str, ...]:
        chosen: list[str] = []
        while len(chosen) < 3:
            chosen.append(_drawn(self._pools[temperament], lambda trait: self._goes_with(trait, chosen)))
        return tuple(chosen)

    def _goes_with(self, trait: str, chosen: list[str]) -> bool:
        return trait not in chosen and not any(
            frozenset((trait, other)) in self._opposites for other in chosen
        )


def with_article(noun: str) -> str:
    """`noun` with the indefinite article that its sound asks for."""
    # "a university", "a user", "a European", "a one-man band".
    sounds_like_consonant = noun.lower().startswith(("uni", "use", "eu", "one"))
    return f"{'an' if noun[0].lower() in 'aeiou' and not sounds_like_consonant else 'a'} {noun}"


def _drawn(deck: Deck[T], fits: Callable[[T], bool] = lambda card: True) -> T:
    card = deck.draw(fits)
    if card is None:
        raise DataError(
            "people.yaml: no piece fits a person that the seeds ask for; add one without `ages` and "
            "`not_with`"
        )
    return card


def _piece_deck(items: list[str | dict[str, Any]], rng: random.Random) -> Deck[Piece]:
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    return Deck([Piece(**row) for row in rows], rng)


def _load(name: str) -> Any:
    return yaml.safe_load((files("rlver_dist.data") / name).read_text(encoding="utf-8"))
