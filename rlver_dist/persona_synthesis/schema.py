"""The two answers that a persona is made of, as JSON schemas, and what a schema cannot say about them.

Lengths are in characters. A Chinese character says about as much as three letters of English.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from rlver_dist.chat_client.protocol import JsonSchema
from rlver_dist.text import distinct_overlap, ngrams, words

Fields = dict[str, Any]
"""The checked fields of an answer; their types are those of its schema."""

PERSON: dict[str, tuple[int, int]] = {"character": (120, 1200), "days": (90, 900), "speech": (60, 700)}
"""Least and most characters of each field, in English."""
SCENE_TEXTS: dict[str, tuple[int, int]] = {
    "topic": (15, 200),
    "cause": (120, 1200),
    "now": (40, 600),
    "reaction": (50, 500),
    "hides": (30, 500),
    "want": (30, 400),
    "opening": (30, 500),
}
SCENE_LISTS: dict[str, tuple[int, int, int, int]] = {
    "timeline": (3, 4, 40, 500),
    "people": (2, 3, 30, 400),
    "tried": (2, 2, 30, 350),
    "facts": (8, 10, 25, 350),
}
"""Least and most entries, and least and most characters of an entry, in English."""
SCENE_ORDER = (
    "topic",
    "cause",
    "timeline",
    "people",
    "tried",
    "now",
    "reaction",
    "hides",
    "want",
    "opening",
    "facts",
)
CHINESE_PER_ENGLISH = 1 / 3
"""Length of a Chinese text / that of an English one that says as much, in characters."""

MAX_WANT_IN_SCENE = 0.5
"""Share of the wish's runs of `RUN` words (Chinese: characters) that the scene or the opening may hold; the
wish is a secret."""
RUN = 4
LEAST_DISTINCT = 0.8
"""Share of an answer's runs of three words (Chinese: characters) that are distinct. The bank's texts have at
least 0.97, RLVER's 0.86."""
LEAST_OWN_SCRIPT = 0.85
"""Share of the letters that have to be of the language's script."""

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_PLACEHOLDER = re.compile(r"[{}<>]|\[[^\]]*\]|\*\*|^#", re.MULTILINE)
# The sheet and the scene speak to the user ("you"), opening and facts are in the user's own voice ("I"): a
# text in the third person would be read as somebody else's.
_SPEAKS_TO_YOU = {"en": re.compile(r"\byou(?:r|rs|rself)?\b", re.IGNORECASE), "zh": re.compile("你")}
_SPEAKS_AS_I = {
    "en": re.compile(r"\b(?:I|my|me|mine|we|our|us)\b", re.IGNORECASE),
    "zh": re.compile("[我咱]"),
}


class Reason(str, Enum):
    """Why an answer is not taken."""

    CALL_FAILED = "call_failed"
    NOT_JSON = "not_json"
    SCHEMA = "schema"
    LANGUAGE = "wrong_language"
    VOICE = "wrong_voice"
    PLACEHOLDER = "placeholder"
    REPETITIVE = "repetitive"
    INTENT_TOLD = "intent_told"
    NEAR_DUPLICATE = "near_duplicate"


class RejectedError(Exception):
    """An answer that is not taken; the asker tries again."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


def person_schema(language: str) -> JsonSchema:
    """JSON schema of a person sheet."""
    return _object({key: _text(*bounds, language) for key, bounds in PERSON.items()})


def scene_schema(language: str) -> JsonSchema:
    """JSON schema of a scene; its fields come in the order in which they are best written."""
    texts = {key: _text(*bounds, language) for key, bounds in SCENE_TEXTS.items()}
    lists = {
        key: {
            "type": "array",
            "minItems": least,
            "maxItems": most,
            "items": _text(shortest, longest, language),
        }
        for key, (least, most, shortest, longest) in SCENE_LISTS.items()
    }
    return _object({key: (texts | lists)[key] for key in SCENE_ORDER})


def parse_person(text: str, language: str, name: str) -> Fields:
    """The fields of the sheet of a person called `name`.

    Raises:
        RejectedError: the answer breaks its schema, or what a schema cannot say (`Reason`).
    """
    fields = _parse(text, person_schema(language))
    _check_prose(list(fields.values()), language)
    for key, value in fields.items():
        _check_voice(value, _SPEAKS_TO_YOU[language], f"{key}: does not speak to the person as 'you'")
        # A sheet that names the person speaks about them, not to them.
        if any(part in value for part in name.split()):
            raise RejectedError(Reason.VOICE, f"{key}: speaks of the person by name")
    return fields


def parse_scene(text: str, language: str) -> Fields:
    """The fields of a scene.

    Raises:
        RejectedError: the answer breaks its schema, or what a schema cannot say (`Reason`).
    """
    fields = _parse(text, scene_schema(language))
    texts = [entry for value in fields.values() for entry in (value if isinstance(value, list) else [value])]
    _check_prose(texts, language)
    # A model that runs out of ideas fills its list with one entry twice.
    for key in SCENE_LISTS:
        if len({"".join(words(entry)) for entry in fields[key]}) < len(fields[key]):
            raise RejectedError(Reason.REPETITIVE, f"{key}: an entry comes twice")
    told = " ".join((fields["cause"], *fields["timeline"], fields["now"]))
    spoken_to = {"cause, timeline, now": told}
    spoken_to |= {key: fields[key] for key in ("reaction", "hides", "want")}
    for key, value in spoken_to.items():
        _check_voice(value, _SPEAKS_TO_YOU[language], f"{key}: does not speak to the person as 'you'")
    _check_voice(" ".join(fields["facts"]), _SPEAKS_AS_I[language], "facts: not in the person's own voice")
    open_text = " ".join((told, *fields["people"], *fields["tried"], fields["opening"]))
    shared = distinct_overlap(_tokens(fields["want"], language), _tokens(open_text, language), RUN)
    if shared > MAX_WANT_IN_SCENE:
        raise RejectedError(
            Reason.INTENT_TOLD, f"want: {shared:.0%} of it stands in the scene or the opening"
        )
    return fields


def _object(properties: dict[str, JsonSchema]) -> JsonSchema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _text(shortest: int, longest: int, language: str) -> JsonSchema:
    scale = CHINESE_PER_ENGLISH if language == "zh" else 1.0
    return {"type": "string", "minLength": int(shortest * scale), "maxLength": int(longest * scale)}


def _parse(text: str, schema: JsonSchema) -> Fields:
    try:
        value = json.loads(text)
        # Half a surrogate pair is no text, and no file takes it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RejectedError(Reason.NOT_JSON, str(error)[:200]) from error
    # An answer may break its schema in many places; one line names the likeliest cause.
    broken = best_match(Draft202012Validator(schema).iter_errors(value))
    if broken is not None:
        raise RejectedError(
            Reason.SCHEMA, f"{broken.json_path}: breaks {broken.validator}: {broken.validator_value!r}"[:200]
        )
    return value


def _check_prose(texts: Sequence[str], language: str) -> None:
    whole = "\n".join(texts)
    if found := _PLACEHOLDER.search(whole):
        raise RejectedError(Reason.PLACEHOLDER, f"holds {found[0][:40]!r}")
    han, latin = len(_HAN.findall(whole)), len(_LATIN.findall(whole))
    # Signs, digits and spaces belong to no language, and a foreign name now and then is allowed.
    own = han if language == "zh" else latin
    if own < LEAST_OWN_SCRIPT * (han + latin) or not own:
        raise RejectedError(Reason.LANGUAGE, f"{own} of {han + latin} letters are {language!r}")
    runs = ngrams(_tokens(whole, language), 3)
    if len(set(runs)) < LEAST_DISTINCT * len(runs):
        raise RejectedError(
            Reason.REPETITIVE, f"{len(set(runs))} of {len(runs)} runs of three words are distinct"
        )


def _check_voice(text: str, voice: re.Pattern[str], complaint: str) -> None:
    if not voice.search(text):
        raise RejectedError(Reason.VOICE, complaint)


def _tokens(text: str, language: str) -> list[str]:
    return _HAN.findall(text) if language == "zh" else words(text)
