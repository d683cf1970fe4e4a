"""The OpenAI-compatible wire format: a request's body, and what a response means. Whatever an endpoint sends
is untrusted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from enum import Enum

from rlver_dist.chat_client.budget import Usage, tokens_of
from rlver_dist.chat_client.protocol import ChatRequest, JsonSchema
from rlver_dist.config.enums import ResponseFormat
from rlver_dist.dialogue import Message, Role

MOST_TOKENS = 10_000_000
"""A count above it is no count of one call's tokens."""
# Untrusted text goes into logs and error lines, so it is short and has no line ends of its own.
LONGEST_EXCERPT = 200
"""Characters of an endpoint's own words in an error."""
QUOTA_CODES = frozenset(
    "insufficient_quota billing_hard_limit_reached billing_not_active insufficient_balance "
    "exceeded_current_quota_error".split()
)
"""What endpoints call a quota or credit that waiting does not refill, in an error's `code` or `type`."""
NEWER_TOKEN_FIELD = "max_completion_tokens"
LENGTH_KEYWORDS = ("minLength", "maxLength")
RETRIED_STATUS = frozenset({408, 409, 425, 429})
"""Statuses below 500 that speak of the moment and not of the request: time-out, conflict, too early, too
many (RFC 9110, RFC 8470, RFC 6585)."""


class Fault(str, Enum):
    """What went wrong with one attempt."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    RATE_LIMIT = "rate_limit"
    SERVER = "server"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    REFUSED = "refused"
    """The endpoint will not take this call, however often it is asked: a 4xx status or a redirect."""
    QUOTA = "quota"


@dataclass(kw_only=True, slots=True, frozen=True)
class Failure:
    """An attempt without an answer.

    Attributes:
        fault: what went wrong, by kind.
        text: one line.
        retry_after_s: seconds that the endpoint asked to wait.
        usage: what it cost, where the endpoint said so.
        lost: the endpoint may have worked for it, and nothing says how much.
        can_adapt: the same call in the endpoint's own dialect may succeed.
    """

    fault: Fault
    text: str
    retry_after_s: float | None = None
    usage: Usage | None = None
    lost: bool = False
    can_adapt: bool = False


@dataclass(kw_only=True, slots=True, frozen=True)
class Reply:
    """An attempt with an answer: the model's text, what it cost, and who answered (empty where the endpoint
    does not say)."""

    text: str
    usage: Usage
    model: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Dialect:
    """How endpoints differ. The defaults are what most servers know; an endpoint that refuses one names it in
    its error, and the next attempt follows it. So no table of hosts and models has to be kept.

    Attributes:
        token_field: name of the limit of the answer; some hosted models take only the newer
            `max_completion_tokens`.
        length_bounds: the schema may bound the length of strings; hosted strict modes may not take that.
    """

    token_field: str = "max_tokens"
    length_bounds: bool = True

    def adapted(self, failure: Failure) -> Dialect:
        """The dialect after a refusal; equal to this one where it names neither difference."""
        if failure.fault is not Fault.REFUSED:
            return self
        if NEWER_TOKEN_FIELD in failure.text:
            return replace(self, token_field=NEWER_TOKEN_FIELD)
        if any(keyword in failure.text for keyword in LENGTH_KEYWORDS):
            return replace(self, length_bounds=False)
        return self


def request_body(
    request: ChatRequest, *, model: str, response_format: ResponseFormat, dialect: Dialect
) -> bytes:
    """The JSON body of one call. For `json_object` the schema goes to the end of the system message."""
    messages = request.messages
    if response_format is ResponseFormat.json_object:
        messages = _with_schema(messages, request.schema)
        format_field: dict[str, object] = {"type": "json_object"}
    else:
        schema = request.schema if dialect.length_bounds else _without_lengths(request.schema)
        format_field = {
            "type": "json_schema",
            "json_schema": {"name": request.schema_name, "schema": schema, "strict": True},
        }
    # `seed` and `temperature` are asked for and not relied on: the answer's record names both.
    body = {
        "model": model,
        "messages": [{"role": message.role.value, "content": message.text} for message in messages],
        dialect.token_field: request.max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "response_format": format_field,
    }
    # ASCII escapes, so that a lone surrogate cannot break the encoding.
    return json.dumps(body).encode("ascii")


def _with_schema(messages: tuple[Message, ...], schema: JsonSchema) -> tuple[Message, ...]:
    order = (
        f"Answer with one JSON object that follows this JSON schema, and nothing "
        f"else:\n{json.dumps(schema, ensure_ascii=False)}"
    )
    # In the system message, and at its end: the talk after it changes with every call, and the prefix before
    # it stays the same for the endpoint's cache.
    if messages and messages[0].role is Role.SYSTEM:
        return (Message(role=Role.SYSTEM, text=f"{messages[0].text}\n\n{order}"), *messages[1:])
    return (Message(role=Role.SYSTEM, text=order), *messages)


def _without_lengths(schema: object) -> object:
    if isinstance(schema, dict):
        return {key: _without_lengths(value) for key, value in schema.items() if key not in LENGTH_KEYWORDS}
    return [_without_lengths(value) for value in schema] if isinstance(schema, list) else schema


def read_success(raw: bytes, *, sent: bytes) -> Reply | Failure:
    """What a response with status 200 holds. Without a usable `usage` tokens are estimated from the bytes of
    body and answer.

    A refusal of the model is its answer: it breaks the schema, which is the asker's matter.
    """
    try:
        body = _loads(raw)
    except ValueError as error:
        return Failure(fault=Fault.MALFORMED, text=f"no JSON ({error})", lost=True)
    usage = _usage(_field(body, "usage"))
    choices = _field(body, "choices")
    message = _field(choices[0], "message") if isinstance(choices, list) and choices else None
    # Hosted strict modes give a refusal a field of its own and leave `content` null.
    text = _field(message, "content") or _field(message, "refusal")
    if not isinstance(text, str) or not _is_unicode(text):
        return Failure(
            fault=Fault.MALFORMED,
            text="no text in choices[0].message.content",
            usage=usage,
            lost=usage is None,
        )
    # Some servers leave `usage` out. A limit on tokens has to hold there as well.
    if usage is None:
        usage = Usage(
            prompt_tokens=tokens_of(sent),
            cached_tokens=0,
            completion_tokens=tokens_of(text.encode("utf-8")),
            estimated=True,
        )
    model = _field(body, "model")
    return Reply(text=text, usage=usage, model=one_line(model) if isinstance(model, str) else "")


def read_error(status: int, raw: bytes, *, retry_after_s: float | None) -> Failure:
    """What a response with another status means."""
    code, text = _error_fields(raw)
    # Quota comes under the status of a rate limit, too, and only the code tells that waiting is in vain.
    line = f"HTTP {status}" + (f" ({text})" if text else "")
    if status == 402 or (status in (403, 429) and code & QUOTA_CODES):
        return Failure(fault=Fault.QUOTA, text=line)
    if status == 429:
        return Failure(fault=Fault.RATE_LIMIT, text=line, retry_after_s=retry_after_s)
    if status >= 500 or status in RETRIED_STATUS:
        return Failure(fault=Fault.SERVER, text=line, retry_after_s=retry_after_s)
    if 300 <= status < 400:
        return Failure(
            fault=Fault.REFUSED,
            text=f"HTTP {status}: a redirect, which is not followed; name the final address",
        )
    return Failure(fault=Fault.REFUSED, text=line)


def one_line(text: str) -> str:
    """`text` without line ends and control characters, cut to `LONGEST_EXCERPT` characters."""
    # Cut before it is looked at as well: only ten times what stays is worth the time.
    printable = "".join(
        character if character.isprintable() else " " for character in text[: 10 * LONGEST_EXCERPT]
    )
    return " ".join(printable.split())[:LONGEST_EXCERPT]


def _error_fields(raw: bytes) -> tuple[set[str], str]:
    """`code` and `type` of an error body, and its message as one line."""
    try:
        body = _loads(raw)
    # A proxy in between answers with a page; the status says enough.
    except ValueError:
        return set(), ""
    # OpenAI nests the error, vLLM and others may not; `detail` is FastAPI's name for the message.
    error = _field(body, "error") or body
    named = {value for value in (_field(error, "code"), _field(error, "type")) if isinstance(value, str)}
    message = error if isinstance(error, str) else _field(error, "message") or _field(error, "detail")
    return named, one_line(message) if isinstance(message, str) else ""


def _usage(value: object) -> Usage | None:
    details = _field(value, "prompt_tokens_details")
    prompt = _count(_field(value, "prompt_tokens"))
    completion = _count(_field(value, "completion_tokens"))
    if prompt is None or completion is None:
        return None
    # Counts are an endpoint's claims: those that cannot be true must not make a cost negative.
    cached = _count(_field(details, "cached_tokens")) or 0
    return Usage(prompt_tokens=prompt, cached_tokens=min(cached, prompt), completion_tokens=completion)


def _count(value: object) -> int | None:
    """`value` where it is a plausible number of tokens (a bool is none)."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _field(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, dict) else None


def _is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which no file and no hash takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _loads(raw: bytes) -> object:
    """Strict JSON: no NaN, no infinity. Raises `ValueError` in every other case, very deep nesting
    included."""
    try:
        return json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value
