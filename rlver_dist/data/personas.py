"""Personas on disk: reading and writing JSONL, one persona a line, UTF-8.

Two formats are read: this project's, whose keys are the fields of `Persona`, and RLVER's (see `rlver.py`).
The first row tells which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Literal

from rlver_dist.data import rlver
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.data.rlver import Row
from rlver_dist.errors import DataError

Split = Literal["train", "evaluation"]
BANK = "bank"
KEYS = tuple(field.name for field in fields(Persona))
LISTS = ("traits", "facts")
DEFAULTS: Row = {
    "hides": "",
    "topic": "",
    "opening": "",
    "situation_id": "",
    "language": "en",
    "traits": [],
    "facts": [],
}
"""Keys that a row may leave out; `situation_id` then takes the row's id."""


def load_split(source: str, split: Split) -> list[Persona]:
    """Personas of `data.train` or `data.evaluation`: `"bank"` is the bank shipped with the package, anything
    else a JSONL file.

    Raises:
        DataError: as `load_personas`.
    """
    if source == BANK:
        name = f"bank/{split}.jsonl"
        return parse_personas((files("rlver_dist.data") / name).read_text(encoding="utf-8"), name)
    return load_personas(source)


def load_personas(path: str | Path) -> list[Persona]:
    """Personas of a JSONL file, in file order.

    Raises:
        DataError: no such file, or a row is refused; the message names file, line, field and the way out.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; name a JSONL file of personas, or '{BANK}' for the bank that comes with "
            f"the package"
        )
    try:
        # "utf-8-sig": editors on Windows begin a file with a byte order mark, which JSON does not take.
        return parse_personas(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error


def parse_personas(text: str, source: str) -> list[Persona]:
    """Personas in JSONL `text`; `source` names it in errors."""
    personas: list[Persona] = []
    line_of: dict[str, int] = {}
    parse: Callable[[Row, str], Persona] | None = None
    # Not splitlines(): it also cuts at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        row = _row(line, where)
        _require_utf8(row, where)
        # By the first row alone: a file is of one format, and a row that is not is refused with its line.
        parse = parse or (rlver.parse_row if rlver.is_rlver_row(row) else parse_row)
        persona = parse(row, where)
        if persona.id in line_of:
            raise DataError(
                f"{where}: id: {persona.id!r} is already used in line {line_of[persona.id]}; give every "
                f"persona its own id"
            )
        line_of[persona.id] = number
        personas.append(persona)
    if not personas:
        raise DataError(f"{source}: holds no persona; write one JSON object a line")
    return personas


def _require_utf8(row: Row, where: str) -> None:
    """Refuse half characters, such as `"\\ud83d"` alone: JSON takes them, and neither a tokenizer nor a file
    does."""
    for key, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {key}: holds half a character ({error.object[error.start]!a}), which UTF-8 cannot "
                f"hold; remove it"
            ) from error


def parse_row(row: Row, where: str) -> Persona:
    """One persona from a row in this project's format; `where` (file:line) opens the error message."""
    # A misspelt optional field would silently take its default.
    if unknown := sorted(set(row) - set(KEYS)):
        raise DataError(f"{where}: {unknown[0]}: unknown field; known are {', '.join(KEYS)}")
    values = DEFAULTS | row
    needed = [key for key in KEYS if key not in DEFAULTS]
    for key in KEYS:
        if key not in values:
            raise DataError(f"{where}: {key}: missing; every persona needs {', '.join(needed)}")
        _check(values[key], key, where)
    return Persona(
        **values
        | {
            "temperament": Temperament(values["temperament"]),
            "hidden_intent": HiddenIntent(values["hidden_intent"]),
            "traits": tuple(values["traits"]),
            "facts": tuple(values["facts"]),
            "situation_id": values["situation_id"] or values["id"],
        }
    )


def dump_personas(personas: Iterable[Persona]) -> str:
    """JSONL text of `personas`, keys in the order of `Persona`; equal personas give equal text."""
    return "".join(json.dumps(asdict(persona), ensure_ascii=False) + "\n" for persona in personas)


def shared_people(train: Iterable[Persona], evaluation: Iterable[Persona]) -> list[Persona]:
    """The evaluation personas whose person sheet a training persona has too, in order; compared as people
    read them, so white space and capitals make no difference."""
    known = {_as_read(persona.profile) for persona in train}
    return [persona for persona in evaluation if _as_read(persona.profile) in known]


def _as_read(text: str) -> str:
    return " ".join(text.split()).casefold()


def leak_notice(train: Sequence[Persona], evaluation: Sequence[Persona]) -> str | None:
    """One line on evaluation personas that training also sees; None where the splits share nobody.

    RLVER's own files are the known case: 54 of the 100 evaluation rows reuse 47 sheets of the training rows.
    """
    shared = shared_people(train, evaluation)
    if not shared:
        return None
    sheets = len({_as_read(persona.profile) for persona in shared})
    scenes = {_as_read(persona.scene) for persona in train}
    with_scene = sum(_as_read(persona.scene) in scenes for persona in shared)
    seen = f", and {with_scene} of them its scene" if with_scene else ""
    return (
        f"data.evaluation: {len(shared)} of {len(evaluation)} personas reuse the person sheet of a training "
        f"persona ({sheets} sheets){seen}; their scores are not of people who are new to the policy"
    )


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one JSON object a line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds a {type(row).__name__}; write one JSON object a line")
    return row


def _check(value: object, key: str, where: str) -> None:
    if key in LISTS:
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise DataError(
                f'{where}: {key}: {value!r} is not a list of texts; write ["...", "..."], or leave the '
                f"field out"
            )
        return
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: {value!r} is not a text; put it in double quotes")
    if key not in DEFAULTS and not value.strip():
        raise DataError(f"{where}: {key}: is empty; write a text")
    for field_name, kind in (("temperament", Temperament), ("hidden_intent", HiddenIntent)):
        known = [member.value for member in kind]
        if key == field_name and value not in known:
            raise DataError(f"{where}: {key}: {value!r} is unknown; use one of {', '.join(known)}")
