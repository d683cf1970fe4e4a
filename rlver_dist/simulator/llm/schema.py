"""What an LLM user may answer: JSON schemas, and the only way from an answer's text to its values.

A number or a decision is read from its own field or not at all. Fields come in the order in which they are to
be thought of, so that the change follows its reasons (SAGE, arXiv:2505.02847, section 2.3).
"""

from __future__ import annotations

import json
from typing import Any

from rlver_dist.chat_client.protocol import JsonSchema
from rlver_dist.simulator.llm.fence import tidy

CHANGE_LIMIT = 10
"""Largest emotion change that an answer can state, points either way; the preset's rules may clip it
further."""
CHARS_PER_TOKEN = {"en": 3, "zh": 1}
"""Characters that one token holds at least, in ordinary text."""
JSON_TOKENS = 60
"""Tokens of an answer that are names and punctuation."""
MIN_CHARS = 20
"""Characters that every text may have, however few tokens there are: a schema that leaves no room for a word
would break every answer."""
ATTITUDES = ("positive", "neutral", "negative")
PYTHON_TYPES: dict[str, type] = {"object": dict, "string": str, "integer": int, "boolean": bool}
"""The types that schemas name here, as `json.loads` gives them."""

Fields = dict[str, Any]
"""The checked fields of an answer; their types are those of its schema."""


class SchemaError(ValueError):
    """An answer does not follow its schema; the message names the field and quotes little of the answer."""


def appraisal_schema(*, language: str, max_tokens: int) -> JsonSchema:
    """SAGE's five steps of an appraisal: four notes, then the change in whole points."""
    note = _text(_chars(language, max_tokens, num_texts=4))
    # An enumeration, since not every endpoint's strict mode knows `minimum` and `maximum`.
    change = {"type": "integer", "enum": list(range(-CHANGE_LIMIT, CHANGE_LIMIT + 1))}
    return _object(content=note, fit=note, activity=note, feeling=note, change=change)


def reply_schema(*, language: str, max_tokens: int) -> JsonSchema:
    """SAGE's steps of a reply, the message itself, and whether it ends the talk."""
    attitude = {"type": "string", "enum": list(ATTITUDES)}
    return _object(attitude=attitude, **_plan_and_message(language, max_tokens), goodbye={"type": "boolean"})


def opening_schema(*, language: str, max_tokens: int) -> JsonSchema:
    """A reply to nothing: no attitude towards anybody, and no end."""
    return _object(**_plan_and_message(language, max_tokens))


def turn_schema(*, language: str, max_appraisal_tokens: int, max_message_tokens: int) -> JsonSchema:
    """Appraisal and reply under one schema."""
    return _object(
        appraisal=appraisal_schema(language=language, max_tokens=max_appraisal_tokens),
        reply=reply_schema(language=language, max_tokens=max_message_tokens),
    )


def parse_answer(text: str, schema: JsonSchema) -> Fields:
    """The answer's fields, each checked against the schema; texts without tags, invisible characters and
    space at their ends.

    Raises:
        SchemaError: no JSON object, a field too many or too few or given twice, a wrong type, or a value
            outside its bounds.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"no JSON: {error} in {_quote(text)}") from error
    fields = _checked(value, schema, "answer")
    assert isinstance(fields, dict), "every answer's schema is that of an object"
    return fields


def _plan_and_message(language: str, max_tokens: int) -> dict[str, JsonSchema]:
    # The message may be as long as the three notes before it together.
    note = _chars(language, max_tokens, num_texts=6)
    return {"aim": _text(note), "tone": _text(note), "content": _text(note), "message": _text(3 * note)}


def _chars(language: str, max_tokens: int, *, num_texts: int) -> int:
    """Characters of each of `num_texts` texts, so that all of them and the JSON around them fit into
    `max_tokens`. An answer cut at its token limit is no JSON and would be lost as a whole."""
    return max((max_tokens - JSON_TOKENS) * CHARS_PER_TOKEN[language] // num_texts, MIN_CHARS)


def _object(**properties: JsonSchema) -> JsonSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(max_chars: int) -> JsonSchema:
    return {"type": "string", "minLength": 1, "maxLength": max_chars}


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # `json.loads` would keep the last of two equal names, and the reasons would belong to another number.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise SchemaError("a field is given twice")
    return fields


def _no_constant(name: str) -> None:
    raise SchemaError(f"{name} is no JSON")


def _checked(value: object, schema: JsonSchema, where: str) -> object:
    """`value` where it follows `schema` (the keywords that this module writes), else `SchemaError`."""
    kind = PYTHON_TYPES[schema["type"]]
    # bool is a subclass of int, and true is no number of points.
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise SchemaError(f"{where}: {_quote(value)} is no {schema['type']}")
    if isinstance(value, dict):
        if value.keys() != schema["properties"].keys():
            raise SchemaError(f"{where}: fields {_quote(sorted(value))}, not {sorted(schema['properties'])}")
        return {
            name: _checked(value[name], part, f"{where}.{name}")
            for name, part in schema["properties"].items()
        }
    if isinstance(value, str):
        written = len(value)
        value = tidy(value)
        # Tidying may write one character as several, so what was written has an upper bound, and what is left
        # of it the lower one.
        if len(value) < schema.get("minLength", 0) or written > schema.get("maxLength", written):
            raise SchemaError(
                f"{where}: {written} characters, {len(value)} to read, not {schema['minLength']} to "
                f"{schema['maxLength']}"
            )
    if "enum" in schema and value not in schema["enum"]:
        raise SchemaError(f"{where}: {_quote(value)} is none of {schema['enum']}")
    return value


def _quote(value: object) -> str:
    # A list or an object may be nested as deep as it likes, too deep to be written out.
    if isinstance(value, list | dict):
        return type(value).__name__
    quoted = ascii(value[:100]) if isinstance(value, str) else ascii(value)
    return quoted if len(quoted) <= 80 else f"{quoted[:80]}..."
