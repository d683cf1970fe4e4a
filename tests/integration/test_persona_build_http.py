"""The persona builder as a command, against an endpoint on loopback that answers with prose of the bank:
interrupted and gone on with."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlver_dist.data.persona import Temperament
from rlver_dist.data.personas import load_split
from rlver_dist.data.situations import load_situations
from rlver_dist.errors import EXIT_INTERRUPTED, EXIT_REFUSED
from tests.timing import hang_limit

KEY = "a-key-that-must-not-be-printed"
SHEETS = [persona.profile for persona in load_split("bank", "train")]
SITUATIONS = load_situations()
SIZES = ["--train", "8", "--evaluation", "4", "--concurrency", "2"]


def sheet(number):
    """A person sheet: the sentences of one of the bank, without the first, which holds the name."""
    sentences = re.split(r"(?<=\.) ", SHEETS[number].replace("\n\n", " "))[1:]
    third = len(sentences) // 3
    parts = sentences[: third + 1], sentences[third + 1 : -third], sentences[-third:]
    return dict(zip(("character", "days", "speech"), map(" ".join, parts), strict=True))


def scene(number):
    situation = SITUATIONS[number]
    fields = {
        key: getattr(situation, key)
        for key in ("topic", "cause", "timeline", "people", "now", "hides", "facts")
    }
    reaction = (
        "You close up when somebody speaks of themselves. You go on when a reply keeps to what you said."
    )
    wish, opening = next(iter(situation.wants.values())), situation.openings[Temperament.NEGATIVE]
    return fields | {"tried": situation.failed, "reaction": reaction, "want": wish, "opening": opening}


class Endpoint(ThreadingHTTPServer):
    """Answers each call with the next piece of the bank."""

    def __init__(self, delay_s):
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s, self.lock, self.given, self.keys = (
            delay_s,
            threading.Lock(),
            {"person": 0, "scene": 0},
            set(),
        )

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One call."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["response_format"]["json_schema"]["name"]
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
            number = self.server.given[name]
            self.server.given[name] += 1
        text = json.dumps((sheet if name == "person" else scene)(number))
        usage = {
            "prompt_tokens": 1000,
            "completion_tokens": 500,
            "prompt_tokens_details": {"cached_tokens": 400},
        }
        answer = json.dumps(
            {"model": "bank", "choices": [{"message": {"content": text}}], "usage": usage}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the asker was stopped meanwhile
            self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with Endpoint(delay_s=0.3) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def start(folder, endpoint, *more):
    prices = [
        "simulator.openai.price_per_million_prompt=2",
        "simulator.openai.price_per_million_completion=8",
    ]
    model = [
        "simulator=openai",
        f"simulator.openai.endpoints={endpoint.url}",
        "simulator.openai.model=any",
        *prices,
    ]
    command = [
        sys.executable,
        "-m",
        "rlver_dist.persona_synthesis",
        "--out",
        str(folder),
        *SIZES,
        *model,
        *more,
    ]
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    out, err = process.communicate(timeout=hang_limit(120))
    assert KEY not in out + err and "Traceback" not in err, err
    return process.returncode, out, err


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_goes_on(tmp_path, endpoint, stop):
    journal = tmp_path / "journal.jsonl"
    # As a script starts what runs in the background.
    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = start(tmp_path, endpoint)
    signal.signal(signal.SIGINT, inherited)
    deadline = time.monotonic() + hang_limit(90)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        assert time.monotonic() < deadline and first.poll() is None, finish(first)
        time.sleep(0.05)
    first.send_signal(stop)
    code, _, err = finish(first)
    if stop is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == EXIT_INTERRUPTED and "the same command goes on" in err
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    code, _, err = finish(start(tmp_path, endpoint))
    assert code == 0, err
    assert [
        len(load_split(str(tmp_path / f"{split}.jsonl"), split)) for split in ("train", "evaluation")
    ] == [8, 4]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    calls = sum(report["rejected"][step]["calls"] for step in ("person", "scene"))
    assert calls == 24 and report["cost"]["cost"] == pytest.approx(24 * (1000 * 2 + 500 * 8) / 1e6)
    assert sum(endpoint.given.values()) <= 24 + 2  # those in flight when it was stopped were asked for again
    assert endpoint.keys == {f"Bearer {KEY}"} and KEY not in journal.read_text(encoding="utf-8")


def test_a_spent_budget_stops_the_command_and_a_larger_one_goes_on(tmp_path, endpoint):
    code, _, err = finish(start(tmp_path, endpoint, "simulator.openai.max_tokens_total=9000"))
    assert code == EXIT_REFUSED and "simulator.openai.max_tokens_total=9000: used up" in err
    assert not (tmp_path / "train.jsonl").exists()
    code, _, err = finish(start(tmp_path, endpoint))
    assert code == 0 and "of 12 personas are there" in err
