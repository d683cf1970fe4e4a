"""Builds the persona bank from the seed situations and the people material: the same bytes on every run.

    python -m rlver_dist.data.bank_builder [--out FOLDER]

Training and evaluation use different situations and different people. In both, the personas are spread evenly
over the 24 cells of hidden intent x temperament and over the situations; each run of 24 personas from the top
of a file covers every cell once, so that the first n of a file are balanced too.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

from rlver_dist.data.people import People
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.data.personas import dump_personas
from rlver_dist.data.situations import SPLITS, Situation, load_situations
from rlver_dist.errors import DataError, UserError

SEED = 1
SIZES = {"train": 240, "evaluation": 100}
"""Personas of each split."""
CELLS = tuple((intent, temperament) for intent in HiddenIntent for temperament in Temperament)

Cell = tuple[HiddenIntent, Temperament]

SCENES = (
    "{cause}\n\n{timeline}\n\n{people}\n\n{failed} {now}\n\n{reaction}",
    "{cause}\n\n{timeline}\n\n{failed}\n\n{people}\n\n{now}\n\n{reaction}",
    "{cause}\n\n{people}\n\n{timeline}\n\n{failed}\n\n{now}\n\n{reaction}",
    "{cause} {people}\n\n{timeline}\n\n{failed} {now}\n\n{reaction}",
)
"""Orders of the parts of a scene; together with the order of the two remedies they tell 8 scenes of one
situation apart."""
FAILED = (
    "You have tried to put it right.",
    "It is not that you sat still.",
    "You did try.",
    "Two things you have tried so far.",
    "What you have done about it has not helped.",
)


def build() -> dict[str, list[Persona]]:
    """The whole bank by split.

    Raises:
        DataError: the seeds cannot carry it; the message names what is missing.
    """
    situations = load_situations()
    # One deck of people for both splits, so that no name comes twice in the bank.
    people = People(SEED)
    return {
        split: _build_split(split, [s for s in situations if s.split == split], people) for split in SPLITS
    }


def write(folder: Path) -> None:
    """Write `train.jsonl` and `evaluation.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, personas in build().items():
        # "\n" on every platform: the files are compared byte by byte.
        (folder / f"{split}.jsonl").write_text(dump_personas(personas), encoding="utf-8", newline="\n")


def allocate(situations: list[Situation], size: int, rng: random.Random) -> list[tuple[Situation, Cell]]:
    """`size` pairs of situation and cell: every cell and every situation as often as every other (give or
    take one).

    Cells come in shuffled rounds of 24; each takes the least used situation that has the intent and not yet
    this very cell. A last, shorter round spreads over the intents first.
    """
    used: Counter[object] = Counter()
    pairs: list[tuple[Situation, Cell]] = []
    while len(pairs) < size:
        for intent, temperament in cells_of_round(size - len(pairs), rng):
            free = [s for s in situations if intent in s.wants and not used[s.id, intent, temperament]]
            if not free:
                raise DataError(
                    f"seeds: too few situations with {intent.value} for {size} personas; write more of them"
                )
            # Drawn for every free one, so that the order of the files decides nothing among equals.
            lot = {s.id: rng.random() for s in free}
            # The least used one; among equals the one less used with this intent, then with this temperament,
            # then by lot.
            chosen = min(
                free, key=lambda s: (used[s.id], used[s.id, intent], used[s.id, temperament], lot[s.id])
            )
            used.update(
                [chosen.id, (chosen.id, intent), (chosen.id, temperament), (chosen.id, intent, temperament)]
            )
            pairs.append((chosen, (intent, temperament)))
    return pairs


def cells_of_round(room: int, rng: random.Random) -> list[Cell]:
    """All cells in a random order, or `room` of them that differ in intent and alternate in temperament as
    long as they can."""
    if room >= len(CELLS):
        return rng.sample(CELLS, len(CELLS))
    intents = list(HiddenIntent)
    kinds = rng.sample(list(Temperament), len(Temperament))
    return [(intents[position % len(intents)], kinds[position % len(kinds)]) for position in range(room)]


def _build_split(split: str, situations: list[Situation], people: People) -> list[Persona]:
    # A generator of its own: another size of one split leaves the other's pairs as they are.
    rng = random.Random(f"{split}:{SEED}")
    told: Counter[str] = Counter()
    personas = []
    for number, (situation, cell) in enumerate(allocate(situations, SIZES[split], rng), start=1):
        scene = _scene(situation, told[situation.id], people.reaction(cell[1]), rng.choice(FAILED))
        told[situation.id] += 1
        personas.append(_persona(f"{split}-{number:03d}", situation, cell, scene, people))
    return personas


def _scene(situation: Situation, telling: int, reaction: str, opening_of_failed: str) -> str:
    """The scene as its `telling`-th user has it; people stay in order, since later ones are described by
    earlier ones."""
    # The order of the remedies changes once all orders of the parts have been used.
    failed = situation.failed if telling // len(SCENES) % 2 == 0 else situation.failed[::-1]
    return SCENES[telling % len(SCENES)].format(
        cause=situation.cause,
        timeline=" ".join(situation.timeline),
        people=" ".join(situation.people),
        failed=" ".join((opening_of_failed, *failed)),
        now=situation.now,
        reaction=reaction,
    )


def _persona(identifier: str, situation: Situation, cell: Cell, scene: str, people: People) -> Persona:
    intent, temperament = cell
    person = people.person(situation, temperament)
    return Persona(
        id=identifier,
        name=person.name,
        profile=person.profile,
        scene=scene,
        temperament=temperament,
        traits=person.traits,
        hidden_intent=intent,
        want=situation.wants[intent],
        hides=situation.hides,
        language="en",
        topic=situation.topic,
        situation_id=situation.id,
        opening=situation.openings[temperament],
        facts=situation.facts,
    )


def main() -> None:
    """Command line: write the bank, by default where the package keeps it."""
    parser = argparse.ArgumentParser(description="Build the persona bank from its seeds.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bank", help="folder to write to")
    try:
        write(parser.parse_args().out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
