"""What an endpoint's bytes mean: any bytes give a reply or a failure, never an exception and never a made-up
count."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.chat_client.budget import Usage
from rlver_dist.chat_client.protocol import ChatRequest
from rlver_dist.chat_client.wire import (
    Dialect,
    Failure,
    Fault,
    Reply,
    one_line,
    read_error,
    read_success,
    request_body,
)
from rlver_dist.config.enums import ResponseFormat
from rlver_dist.dialogue import Message, Role

SCHEMA = {
    "type": "object",
    "properties": {"note": {"type": "string", "minLength": 1, "maxLength": 9}},
    "required": ["note"],
    "additionalProperties": False,
}
MESSAGES = (Message(role=Role.SYSTEM, text="You are Ada."), Message(role=Role.USER, text="Hello \u4f60"))
REQUEST = ChatRequest(
    key="d/0/reply",
    messages=MESSAGES,
    schema_name="reply",
    schema=SCHEMA,
    max_tokens=50,
    temperature=0.0,
    seed=7,
    affinity="p",
)
USED = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("choices message content usage error".split()), inner)
    ),
    max_leaves=12,
)


def body(request: ChatRequest = REQUEST, response_format=ResponseFormat.json_schema, dialect=None) -> dict:
    return json.loads(
        request_body(request, model="m", response_format=response_format, dialect=dialect or Dialect())
    )


def success(content="{}", usage=USED, **fields) -> bytes:
    return json.dumps(
        {"model": "m-1", "choices": [{"message": {"content": content}}], "usage": usage} | fields
    ).encode()


def test_body_holds_the_request() -> None:
    assert body() == {
        "model": "m",
        "max_tokens": 50,
        "temperature": 0.0,
        "seed": 7,
        "messages": [
            {"role": "system", "content": "You are Ada."},
            {"role": "user", "content": "Hello \u4f60"},
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True},
        },
    }


def test_without_schemas_the_system_message_states_it_and_the_rest_stays() -> None:
    said = body(response_format=ResponseFormat.json_object)
    assert said["response_format"] == {"type": "json_object"}
    system, user = said["messages"]
    assert system["content"].startswith("You are Ada.") and json.dumps(SCHEMA) in system["content"]
    assert user["content"] == "Hello \u4f60"


def test_dialects_follow_what_an_endpoint_refuses() -> None:
    tokens = read_error(
        400, b'{"error": {"message": "Use \'max_completion_tokens\' instead."}}', retry_after_s=None
    )
    lengths = read_error(
        400, b'{"error": {"message": "In context, \'maxLength\' is not permitted."}}', retry_after_s=None
    )
    dialect = Dialect().adapted(tokens).adapted(lengths)
    assert dialect == Dialect(token_field="max_completion_tokens", length_bounds=False)
    assert dialect.adapted(tokens) == dialect.adapted(lengths) == dialect
    said = body(dialect=dialect)
    assert said["max_completion_tokens"] == 50 and "max_tokens" not in said
    assert said["response_format"]["json_schema"]["schema"]["properties"] == {"note": {"type": "string"}}
    assert (
        Dialect().adapted(read_error(500, b'{"error": "max_completion_tokens"}', retry_after_s=None))
        == Dialect()
    )


def test_reply_is_text_usage_and_model() -> None:
    usage = Usage(prompt_tokens=10, cached_tokens=6, completion_tokens=4)
    assert read_success(success('{"a": 1}'), sent=b"") == Reply(text='{"a": 1}', usage=usage, model="m-1")
    refused = read_success(
        success(None, choices=[{"message": {"content": None, "refusal": "I cannot."}}]), sent=b""
    )
    assert isinstance(refused, Reply) and refused.text == "I cannot."


@pytest.mark.parametrize(
    "usage",
    [
        None,
        5,
        {},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": "10", "completion_tokens": 1},
        {"prompt_tokens": 10**12, "completion_tokens": 1},
    ],
)
def test_unusable_usage_is_estimated_from_bytes(usage) -> None:
    reply = read_success(success("\u4f60\u597d!", usage), sent=b"x" * 401)
    assert isinstance(reply, Reply)
    assert reply.usage == Usage(prompt_tokens=101, cached_tokens=0, completion_tokens=2, estimated=True)


def test_more_cached_than_prompt_is_not_believed() -> None:
    details = {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 50}}
    assert read_success(success(usage=details), sent=b"").usage.cached_tokens == 10


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>",
        b"NaN",
        b'{"choices": NaN}',
        success(usage={"prompt_tokens": float("nan")}),
        b"\xff\xfe\xfd",
        b"[" * 200_000,
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 9000 + b"}",
    ],
)
def test_what_is_no_json_may_have_cost_something(raw: bytes) -> None:
    failure = read_success(raw, sent=b"")
    assert (
        isinstance(failure, Failure)
        and failure.fault is Fault.MALFORMED
        and failure.lost
        and failure.usage is None
    )


@pytest.mark.parametrize(
    "choices", [None, [], {}, "x", [None], [{"message": None}], [{"message": {"content": 7}}]]
)
def test_a_body_without_text_is_charged_as_it_says(choices) -> None:
    failure = read_success(success(choices=choices), sent=b"")
    assert isinstance(failure, Failure) and failure.fault is Fault.MALFORMED
    assert not failure.lost and failure.usage == Usage(prompt_tokens=10, cached_tokens=6, completion_tokens=4)


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert isinstance(read_success(success("\ud800"), sent=b""), Failure)


@pytest.mark.parametrize(
    ("status", "raw", "fault"),
    [
        (402, b"", Fault.QUOTA),
        (429, b'{"error": {"code": "insufficient_quota", "message": "m"}}', Fault.QUOTA),
        (429, b'{"error": {"type": "insufficient_quota", "message": "m"}}', Fault.QUOTA),
        (403, b'{"error": {"code": "billing_not_active"}}', Fault.QUOTA),
        (429, b'{"error": {"code": "rate_limit_exceeded"}}', Fault.RATE_LIMIT),
        (429, b"<html>", Fault.RATE_LIMIT),
        (500, b'{"error": {"code": "insufficient_quota"}}', Fault.SERVER),
        (503, b"", Fault.SERVER),
        (408, b"", Fault.SERVER),
        (307, b"", Fault.REFUSED),
        (400, b"", Fault.REFUSED),
        (401, b"", Fault.REFUSED),
        (404, b'{"error": {"code": {"a": []}, "message": ["m"]}}', Fault.REFUSED),
    ],
)
def test_statuses(status: int, raw: bytes, fault: Fault) -> None:
    failure = read_error(status, raw, retry_after_s=None)
    assert failure.fault is fault and str(status) in failure.text and not failure.lost


def test_an_endpoints_words_are_one_short_line() -> None:
    failure = read_error(
        400, json.dumps({"error": {"message": "a\nb\x1b[2J\u202e" + "c" * 5000}}).encode(), retry_after_s=None
    )
    assert len(failure.text) < 230 and failure.text.isprintable() and "a b [2J" in failure.text
    assert one_line("  a \r\n b ") == "a b"


@given(
    st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from([200, 400, 402, 429, 500]),
)
def test_any_bytes_are_read_without_an_exception(raw: bytes, status: int) -> None:
    outcome = read_success(raw, sent=b"") if status == 200 else read_error(status, raw, retry_after_s=1.0)
    assert isinstance(outcome, Reply | Failure)
    if isinstance(outcome, Failure):
        assert not (outcome.lost and outcome.usage)
