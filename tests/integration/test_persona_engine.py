"""Personas written by a real engine: SmolLM2 on vLLM, each answer held to its JSON schema while it is
sampled."""

import json

import pytest

from rlver_dist.bundled_models import SMOLLM2
from rlver_dist.chat_client.budget import Prices
from rlver_dist.data.personas import load_split
from rlver_dist.data.situations import SPLITS
from rlver_dist.persona_synthesis.__main__ import build, parse_arguments, simulator_config
from rlver_dist.persona_synthesis.backend import open_backend
from rlver_dist.persona_synthesis.schema import Reason
from rlver_dist.persona_synthesis.writer import MAX_TOKENS, Step
from rlver_dist.simulator.rules.embedding import SentenceEncoder
from rlver_dist.simulator.suitability import check_personas

OVERRIDES = [
    "simulator=vllm",
    f"simulator.engine.model={SMOLLM2}",
    "simulator.engine.max_context_tokens=6144",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a small build. A model of this size writes next to nothing that is accepted, so the exit
    code says nothing."""
    folder = tmp_path_factory.mktemp("personas")
    sizes = ["--train", "1", "--evaluation", "1", "--attempts", "1"]
    options = parse_arguments(["--out", str(folder), *sizes, *OVERRIDES])
    encoder = SentenceEncoder()
    build(
        options,
        backend=open_backend(
            simulator_config(options.overrides), seed=options.seed, concurrency=options.concurrency
        ),
        embed=lambda sentences: encoder.vectors(sentences).numpy(),
        prices=Prices(completion=1.0),
    )
    return folder


def entries_of(folder):
    return [
        json.loads(line) for line in (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    ]


def test_every_whole_answer_follows_its_schema(built):
    entries = entries_of(built)
    assert sum(entry["step"] == "person" for entry in entries) == 2
    assert all(
        0 < entry["completion_tokens"] <= MAX_TOKENS[Step(entry["step"])] and entry["model"] == SMOLLM2
        for entry in entries
    )
    broken = [entry for entry in entries if entry["verdict"] in (Reason.NOT_JSON.value, Reason.SCHEMA.value)]
    assert all(entry["completion_tokens"] == MAX_TOKENS[Step(entry["step"])] for entry in broken), broken
    assert len(broken) < len(entries)


def test_the_report_adds_up_and_what_is_accepted_can_be_trained_on(built):
    entries, report = entries_of(built), json.loads((built / "report.json").read_text(encoding="utf-8"))
    accepted = sum(entry["step"] == "scene" and entry["verdict"] == "accepted" for entry in entries)
    written = [split for split in SPLITS if report["splits"][split]["written"]]
    personas = [persona for split in written for persona in load_split(str(built / f"{split}.jsonl"), split)]
    assert len(personas) == accepted == 2 - len(report["missing"])
    check_personas(personas)
    assert all(persona.want not in persona.scene and persona.name in persona.profile for persona in personas)
    assert report["cost"]["cost"] == pytest.approx(sum(entry["completion_tokens"] for entry in entries) / 1e6)
