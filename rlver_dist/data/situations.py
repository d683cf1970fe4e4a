"""The hand-written seed situations of the bank: what happened, who was there, what the user may want, and
what they reveal.

One YAML file per area of life under `seeds/`; the checks are strict, since every mistake here would be copied
into several personas.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

import yaml

from rlver_dist.data.persona import HiddenIntent, Temperament
from rlver_dist.errors import DataError

SPLITS = ("train", "evaluation")
LENGTHS = {
    "ages": (2, 2),
    "occupations": (3, 4),
    "timeline": (3, 4),
    "people": (2, 3),
    "failed": (2, 2),
    "facts": (10, 10),
}
"""Least and most items of each list."""
NUM_WANTS = 4
Kind = TypeVar("Kind", bound=Enum)


@dataclass(kw_only=True, slots=True, frozen=True)
class Situation:
    """One seed; all prose addresses the user as "you", but `openings` and `facts` are in the user's own
    voice.

    Attributes:
        id: unique over all areas.
        area: area of life, the file's name.
        split: "train" or "evaluation".
        topic: one line that says what it is about.
        ages: youngest and oldest user, in years.
        occupations: 3 or 4 that fit.
        cause: how it began.
        timeline: 3 or 4 dated sentences.
        people: 2 or 3 sentences on who else is in it and what drives them; later ones may refer to earlier
            ones.
        failed: 2 remedies that failed.
        now: where things stand.
        hides: what the user admits late or never.
        wants: the 4 intents that the situation can carry, each in its own terms.
        openings: the user's first message, by temperament.
        facts: 10 messages, from the surface to the depth.
    """

    id: str
    area: str
    split: str
    topic: str
    ages: tuple[int, int]
    occupations: tuple[str, ...]
    cause: str
    timeline: tuple[str, ...]
    people: tuple[str, ...]
    failed: tuple[str, ...]
    now: str
    hides: str
    wants: dict[HiddenIntent, str]
    openings: dict[Temperament, str]
    facts: tuple[str, ...]

    def text(self) -> str:
        """Everything a user could say or read of it, for a search for names."""
        texts = (
            self.cause,
            *self.timeline,
            *self.people,
            *self.failed,
            self.now,
            self.hides,
            *self.openings.values(),
            *self.facts,
        )
        return "\n".join(texts)


FIELDS = tuple(field.name for field in fields(Situation))
TEXTS = ("id", "area", "split", "topic", "cause", "now", "hides")


def load_situations(folder: Traversable | None = None) -> list[Situation]:
    """All situations under `folder` (default: the package's seeds), by file name and then in file order.

    Raises:
        DataError: a seed is refused; the message names file, situation and field.
    """
    folder = folder or files("rlver_dist.data") / "seeds"
    situations: list[Situation] = []
    # Sorted by name, since folders list their files in any order and the bank's bytes depend on it.
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name):
        situations.extend(_load_area(file))
    seen: set[str] = set()
    for situation in situations:
        if situation.id in seen:
            raise DataError(
                f"{situation.area}.yaml: {situation.id}: id: used twice; give every situation its own id"
            )
        seen.add(situation.id)
    return situations


def _load_area(file: Traversable) -> list[Situation]:
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(
            f"{file.name}: not YAML: {' '.join(str(error).split())}; put every text in double quotes"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{file.name}: is not a list of situations; write at least one")
    return [_parse(row, file.name, position) for position, row in enumerate(rows, start=1)]


def _parse(row: object, file_name: str, position: int) -> Situation:
    number = f"situation {position}"
    where = f"{file_name}: {row.get('id', number) if isinstance(row, dict) else number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: is a {type(row).__name__}; write a mapping of {', '.join(FIELDS)}")
    for key in FIELDS:
        if key not in row:
            raise DataError(f"{where}: {key}: missing; a situation has {', '.join(FIELDS)}")
    if unknown := sorted(set(map(str, row)) - set(FIELDS)):
        raise DataError(f"{where}: {unknown[0]}: unknown field; a situation has {', '.join(FIELDS)}")
    for key in TEXTS:
        _check_text(row[key], f"{where}: {key}")
    if row["area"] != file_name.removesuffix(".yaml"):
        raise DataError(f"{where}: area: {row['area']!r}; use the file's name")
    if row["split"] not in SPLITS:
        raise DataError(f"{where}: split: {row['split']!r}; use one of {', '.join(SPLITS)}")
    lists = {key: _parse_list(row[key], key, where) for key in LENGTHS}
    wants = _parse_mapping(row["wants"], HiddenIntent, f"{where}: wants")
    if len(wants) != NUM_WANTS:
        raise DataError(f"{where}: wants: has {len(wants)} intents; write exactly {NUM_WANTS}")
    openings = _parse_mapping(row["openings"], Temperament, f"{where}: openings")
    if len(openings) != len(Temperament):
        raise DataError(f"{where}: openings: write one for each of {', '.join(t.value for t in Temperament)}")
    return Situation(**row | lists | {"wants": wants, "openings": openings})


def _parse_list(value: object, key: str, where: str) -> tuple[Any, ...]:
    least, most = LENGTHS[key]
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise DataError(
            f"{where}: {key}: write a list of {least if least == most else f'{least} to {most}'} items"
        )
    if key == "ages":
        # `type` and not `isinstance`: YAML's `yes` is a bool, and a bool is an int.
        if not all(type(age) is int for age in value) or not 14 <= value[0] < value[1] <= 99:
            raise DataError(
                f"{where}: ages: {value!r}; write the youngest and the oldest age in years, from 14 to 99"
            )
    else:
        for item in value:
            _check_text(item, f"{where}: {key}")
    return tuple(value)


def _parse_mapping(value: object, kind: type[Kind], where: str) -> dict[Kind, str]:
    known = [member.value for member in kind]
    if not isinstance(value, dict):
        raise DataError(f"{where}: {value!r}; write a mapping with keys out of {', '.join(known)}")
    for key, text in value.items():
        if key not in known:
            raise DataError(f"{where}: {key!r} is unknown; use {', '.join(known)}")
        _check_text(text, f"{where}.{key}")
    return {kind(key): text for key, text in value.items()}


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {value!r} is not a text; write a sentence in double quotes")
    # Curly quotes and dashes come in by copying; all users should write alike.
    if not value.isascii():
        raise DataError(
            f"{where}: {value!r} has characters beyond ASCII; seeds use plain punctuation and letters"
        )
