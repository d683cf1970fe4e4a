"""What each persona is asked for: a plan, balanced over intents and temperaments, that sizes, languages and
seed alone decide."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

import yaml

from rlver_dist.data.bank_builder import cells_of_round
from rlver_dist.data.people import Deck
from rlver_dist.data.persona import HiddenIntent, Temperament
from rlver_dist.data.situations import SPLITS
from rlver_dist.errors import DataError

LANGUAGES = ("en", "zh")
NUM_TRAITS = 3
ADULT = (19, 64)
"""Ages of an occupation that names none, in years."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Slot:
    """One persona to be written.

    Attributes:
        id: the persona's id, unique in the plan.
        split: "train" or "evaluation".
        language: "en" or "zh"; `traits`, `name` and `occupation` are in it.
        number: 1 for the first of its split and language.
        intent: what the user wants from the talk and does not say.
        temperament: how the user takes things.
        traits: three trait words, no two of them opposites.
        name: borne by nobody else in the plan.
        age: years.
        occupation: without an article.
    """

    id: str
    split: str
    language: str
    number: int
    intent: HiddenIntent
    temperament: Temperament
    traits: tuple[str, ...]
    name: str
    age: int
    occupation: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Subject:
    """What a scene is about: a theme, and a concrete thing that it turns on, in the slot's language."""

    theme: str
    spark: str


def plan(*, sizes: dict[str, int], languages: Sequence[str], seed: int) -> list[Slot]:
    """The slots of all splits, each size shared evenly by the languages.

    Every run of 24 slots of one split and language from its first on covers every cell of intent x
    temperament once.

    Raises:
        DataError: there are fewer names than slots in a language.
    """
    slots = []
    for language in languages:
        names = _names(language, random.Random(f"names:{language}:{seed}"))
        for split in SPLITS:
            # A generator for each split and language: another size of one leaves the others as they are.
            rng = random.Random(f"{split}:{language}:{seed}")
            size = _size_of_language(sizes[split], languages, language)
            slots += _split_slots(split, language, size, names, rng)
    return sorted(
        slots, key=lambda slot: (SPLITS.index(slot.split), slot.number, languages.index(slot.language))
    )


def subject(slot: Slot, *, draw: int, seed: int) -> Subject:
    """What the scene of `slot` is about; another `draw` gives another theme.

    Draw 0 uses the themes of a split in turn, so that each is used about equally often. The splits share no
    theme.
    """
    themes = _material()["themes"][slot.split]
    sparks = _material()["sparks"]
    # Split and language have one order of themes, so that slots in turn take all of them; the spark is drawn
    # anew for every slot and draw.
    order = random.Random(f"themes:{slot.split}:{slot.language}:{seed}").sample(
        range(len(themes)), len(themes)
    )
    spark = random.Random(f"spark:{slot.id}:{draw}:{seed}").choice(sparks)
    theme = themes[order[(slot.number - 1 + draw) % len(themes)]]
    return Subject(theme=theme[slot.language], spark=spark[slot.language])


def _split_slots(
    split: str, language: str, size: int, names: Iterator[str], rng: random.Random
) -> list[Slot]:
    pools, opposites = _trait_pools()
    occupations: Deck[dict[str, Any]] = Deck(_material()["occupations"], rng)
    cells: list[tuple[HiddenIntent, Temperament]] = []
    while len(cells) < size:
        cells += cells_of_round(size - len(cells), rng)
    own_names = list(islice(names, size))
    if len(own_names) < size:
        raise DataError(
            f"--{split}={size}: the seeds have too few names in {language!r}; ask for fewer personas"
        )
    slots = []
    for number, ((intent, temperament), name) in enumerate(zip(cells, own_names, strict=True), start=1):
        occupation = occupations.draw()
        assert occupation is not None
        traits = _three_traits(pools[temperament], opposites, rng)
        if language == "zh":
            traits = tuple(_material()["traits_zh"][trait] for trait in traits)
        slots.append(
            Slot(
                id=f"{split}-{language}-{number:04d}",
                split=split,
                language=language,
                number=number,
                intent=intent,
                temperament=temperament,
                traits=traits,
                name=name,
                age=rng.randint(*occupation.get("ages", ADULT)),
                occupation=occupation[language],
            )
        )
    return slots


def _size_of_language(size: int, languages: Sequence[str], language: str) -> int:
    """Personas of `language`, where the first languages take what does not divide evenly."""
    return size // len(languages) + (languages.index(language) < size % len(languages))


def _three_traits(pool: list[str], opposites: list[frozenset[str]], rng: random.Random) -> tuple[str, ...]:
    chosen: list[str] = []
    for trait in rng.sample(pool, len(pool)):
        # "shy" and "outgoing" together would leave the model to choose one of them.
        if len(chosen) < NUM_TRAITS and not any(frozenset((trait, other)) in opposites for other in chosen):
            chosen.append(trait)
    return tuple(chosen)


def _names(language: str, rng: random.Random) -> Iterator[str]:
    """Full names, none twice; a given name comes again only after all others have been used as often."""
    if language == "zh":
        material = _material()["names_zh"]
        pairs = [(given, list(material["family"])) for given in material["given"]]
    else:
        groups = yaml.safe_load((files("rlver_dist.data") / "names.yaml").read_text(encoding="utf-8"))
        pairs = [(given, list(group["family"])) for group in groups for given in group["given"]]
    # Shuffled within and over the groups: given and family name of one group belong to one culture.
    pairs = [
        (given, rng.sample(families, len(families))) for given, families in rng.sample(pairs, len(pairs))
    ]
    for turn in range(max(len(families) for _, families in pairs)):
        for given, families in pairs:
            if turn < len(families):
                yield families[turn] + given if language == "zh" else f"{given} {families[turn]}"


@cache
def _material() -> dict[str, Any]:
    return yaml.safe_load((files("rlver_dist.persona_synthesis") / "seeds.yaml").read_text(encoding="utf-8"))


@cache
def _trait_pools() -> tuple[dict[Temperament, list[str]], list[frozenset[str]]]:
    people = yaml.safe_load((files("rlver_dist.data") / "people.yaml").read_text(encoding="utf-8"))
    pools = {kind: people["trait_pools"][kind.value] for kind in Temperament}
    return pools, [frozenset(pair) for pair in people["opposites"]]
