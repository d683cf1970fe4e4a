"""Import of RLVER's persona rows (Tencent/digitalhuman, `RLVER/data/*.jsonl` and `SAGE/profile/*.jsonl`),
which are in Chinese.

A row holds `id`, `player` (the person sheet), `scene`, `main_cha` (temperament), `cha_group` (traits) and
`task` (hidden intent); only SAGE's evaluation rows hold `first_talk` (the opening), and `topic` is in none of
the released files. Every scene ends with a marker section that repeats the hidden intent; it is split off
here, since a scene never holds the intent.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.errors import DataError

Row = dict[str, Any]
"""One line of a JSONL file, not checked yet."""
Kind = TypeVar("Kind")

KEYS = ("player", "main_cha", "task")
TEMPERAMENTS = {"负面": Temperament.NEGATIVE, "被动": Temperament.PASSIVE, "回避": Temperament.AVOIDANT}
INTENTS = {
    "辩证": HiddenIntent.BALANCED_VIEW,
    "建议": HiddenIntent.PRACTICAL_ADVICE,
    "其他人物": HiddenIntent.UNDERSTAND_OTHERS,
    "反思": HiddenIntent.SELF_REFLECTION,
    "夸奖": HiddenIntent.PRAISE,
    "宣泄": HiddenIntent.BE_HEARD,
    "共情": HiddenIntent.DEEP_EMPATHY,
    "没有错": HiddenIntent.NO_FAULT,
}
"""A word of each of the eight intents that no other intent holds."""

# A line of its own (a heading, bold or plain) that holds nothing but the words "hidden theme".
MARKER = re.compile(r"^[ \t#*>-]*隐藏(?:主题|意图)[ \t*]*[:\uff1a]?[ \t*]*$", re.MULTILINE)
# The same words with the intent after a colon in the same line.
INLINE_MARKER = re.compile(r"^[ \t#*>-]*隐藏(?:主题|意图)[ \t*]*[:\uff1a].*$", re.MULTILINE)
NAME = re.compile(r"姓名[\s*]*[:\uff1a][\s*]*([^\s*,;\uff0c\u3002\uff1b]+)")


def is_rlver_row(row: Row) -> bool:
    """True where the row has one of the keys that only RLVER's format has."""
    return any(key in row for key in KEYS)


def parse_row(row: Row, where: str) -> Persona:
    """One persona from an RLVER row; `where` (file:line) opens the error message.

    Raises:
        DataError: a field is missing or unknown.
    """
    player = _text(row, "player", where)
    scene = _text(row, "scene", where)
    task = _text(row, "task", where)
    identifier = _text(row, "id", where)
    name = NAME.search(player)
    if name is None:
        raise DataError(
            f"{where}: player: has no line with the name; the sheet needs one that starts with 姓名:"
        )
    return Persona(
        id=identifier,
        name=name[1],
        profile=player.strip(),
        scene=split_marker(scene),
        temperament=_lookup(TEMPERAMENTS, row, "main_cha", where),
        traits=_traits(row, where),
        hidden_intent=_lookup(INTENTS, row, "task", where),
        want=task.strip(),
        hides="",
        language="zh",
        topic=_optional_text(row, "topic", where),
        situation_id=identifier,
        opening=_optional_text(row, "first_talk", where),
        facts=(),
    )


def split_marker(scene: str) -> str:
    """`scene` without the section at its end that names the hidden intent; unchanged where there is none."""
    # From the last one on, since the section is the end of the scene.
    markers = [*MARKER.finditer(scene), *INLINE_MARKER.finditer(scene)]
    if markers:
        scene = scene[: max(marker.start() for marker in markers)]
    return scene.strip()


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key}: {value!r}; a row in RLVER's format needs a text here")
    return value


def _optional_text(row: Row, key: str, where: str) -> str:
    return _text(row, key, where).strip() if row.get(key) else ""


def _traits(row: Row, where: str) -> tuple[str, ...]:
    value = row.get("cha_group")
    texts = isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
    if not value or not texts:
        raise DataError(
            f"{where}: cha_group: {value!r}; a row in RLVER's format needs a list of trait words here"
        )
    return tuple(value)


def _lookup(kinds: dict[str, Kind], row: Row, key: str, where: str) -> Kind:
    value = _text(row, key, where)
    # The rows hold whole sentences, written by a model, so a kind is known by a word that no other one holds.
    found = [kind for word, kind in kinds.items() if word in value]
    if len(found) != 1:
        raise DataError(
            f"{where}: {key}: {value!r} is unknown or ambiguous; use a text with exactly one of "
            f"{', '.join(kinds)}"
        )
    return found[0]
