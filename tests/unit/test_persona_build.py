# ruff: noqa: RUF001
"""Personas by a chat model: the plan, the checks, retries, near duplicates, resume and the report, with a
scripted model."""

import asyncio
import json
import random
import zlib
from collections import Counter
from contextlib import asynccontextmanager

import numpy as np
import pytest

from rlver_dist.chat_client.budget import Prices
from rlver_dist.chat_client.protocol import ChatAnswer
from rlver_dist.data.bank_builder import CELLS
from rlver_dist.data.persona import Temperament
from rlver_dist.data.personas import load_split
from rlver_dist.data.situations import load_situations
from rlver_dist.errors import BoundaryError, BudgetError, ConfigError, DataError
from rlver_dist.persona_synthesis import seeds
from rlver_dist.persona_synthesis.__main__ import build, parse_arguments, simulator_config
from rlver_dist.persona_synthesis.journal import Journal
from rlver_dist.persona_synthesis.prompts import person_messages, scene_messages
from rlver_dist.persona_synthesis.schema import Reason, RejectedError, parse_person, parse_scene, scene_schema
from rlver_dist.persona_synthesis.similarity import MOST_SIMILAR, Index, chinese_vector, english_vector
from rlver_dist.simulator.rules.embedding import SentenceEncoder
from rlver_dist.simulator.suitability import check_personas

PRICES = Prices(prompt=2.0, cached=1.0, completion=10.0)
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu".split()


def embed(sentences):
    """A bag of hashed words, which stands for MiniLM."""
    vectors = np.zeros((len(sentences), 1024))
    for row, sentence in zip(vectors, sentences, strict=True):
        for word in sentence.lower().strip(".").split():
            row[zlib.crc32(word.encode()) % 1024] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def prose(rng, language, size, start=""):
    """Random words that no two calls share, at least `size` characters long, beginning with `start`."""
    text = start
    while len(text) < size:
        if language == "zh":
            text += chr(rng.randint(0x4E00, 0x9F00))
        else:
            text += " " + "".join(rng.sample(SYLLABLES, 3))
    return text + ("。" if language == "zh" else ".")


def person(rng, language="en"):
    you, size = ("你", 60) if language == "zh" else ("You", 150)
    return {key: prose(rng, language, size, you) for key in ("character", "days", "speech")}


def scene(rng, language="en"):
    you, i, size = ("你", "我", 50) if language == "zh" else ("You", "I", 130)
    texts = {
        key: prose(rng, language, size, you) for key in ("topic", "cause", "now", "reaction", "hides", "want")
    }
    counts = {"timeline": 3, "people": 2, "tried": 2}
    lists = {key: [prose(rng, language, size, you) for _ in range(count)] for key, count in counts.items()}
    return (
        texts
        | lists
        | {
            "opening": prose(rng, language, size, i),
            "facts": [prose(rng, language, size, i) for _ in range(8)],
        }
    )


class Scripted:
    """A chat model that answers well, except where `misbehave` gives another text or an error for a
    request."""

    def __init__(self, misbehave=lambda request: None):
        self.misbehave = misbehave
        self.requests = []

    async def ask(self, request):
        self.requests.append(request)
        await asyncio.sleep(0)
        said = self.misbehave(request)
        if isinstance(said, Exception):
            raise said
        language = "zh" if "-zh-" in request.key else "en"
        write = person if request.schema_name == "person" else scene
        text = said or json.dumps(write(random.Random(request.key), language), ensure_ascii=False)
        return ChatAnswer(
            text=text,
            prompt_tokens=100,
            cached_tokens=40,
            completion_tokens=30,
            seconds=0.5,
            retries=0,
            model="scripted",
        )

    def metrics(self):
        return {}

    async def close(self):
        pass


def run(folder, model, *arguments):
    @asynccontextmanager
    async def opened():
        yield model

    return build(
        parse_arguments(["--out", str(folder), *arguments]), backend=opened(), embed=embed, prices=PRICES
    )


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# The plan


def test_each_round_of_a_split_and_language_covers_every_cell():
    slots = seeds.plan(sizes={"train": 100, "evaluation": 48}, languages=["en", "zh"], seed=3)
    assert slots == seeds.plan(sizes={"train": 100, "evaluation": 48}, languages=["en", "zh"], seed=3)
    assert slots != seeds.plan(sizes={"train": 100, "evaluation": 48}, languages=["en", "zh"], seed=4)
    for split, language, size in (
        ("train", "en", 50),
        ("train", "zh", 50),
        ("evaluation", "en", 24),
        ("evaluation", "zh", 24),
    ):
        own = [slot for slot in slots if (slot.split, slot.language) == (split, language)]
        assert len(own) == size
        assert {(slot.intent, slot.temperament) for slot in own[:24]} == set(CELLS)
        assert set(Counter(slot.intent for slot in own).values()) <= {size // 8, size // 8 + 1}


def test_nobody_shares_a_name_and_the_splits_share_no_theme():
    slots = seeds.plan(sizes={"train": 400, "evaluation": 100}, languages=["en", "zh"], seed=1)
    assert len({slot.id for slot in slots}) == len({slot.name for slot in slots}) == 500
    train, evaluation = (
        {seeds.subject(slot, draw=0, seed=1).theme for slot in slots if slot.split == split}
        for split in seeds.SPLITS
    )
    assert not train & evaluation
    assert len(train) == 88 and len(evaluation) == 40  # 44 and 20 themes in two languages
    for slot in slots:
        assert len(set(slot.traits)) == 3 and 16 <= slot.age <= 78
        assert all(
            trait.isascii() == (slot.language == "en")
            for trait in (*slot.traits, slot.occupation, slot.name[:1])
        )


def test_themes_come_in_turn_and_a_new_draw_changes_them():
    slots = [s for s in seeds.plan(sizes={"train": 88, "evaluation": 0}, languages=["en"], seed=1)]
    assert set(Counter(seeds.subject(slot, draw=0, seed=1).theme for slot in slots).values()) == {2}
    assert all(
        seeds.subject(slot, draw=0, seed=1).theme != seeds.subject(slot, draw=1, seed=1).theme
        for slot in slots
    )


def test_more_personas_than_names_are_refused():
    with pytest.raises(DataError, match="--train=9999: the seeds have too few names in 'en'"):
        seeds.plan(sizes={"train": 9999, "evaluation": 0}, languages=["en"], seed=1)


def test_prompts_hold_the_seeds_and_begin_alike():
    first, second = seeds.plan(sizes={"train": 2, "evaluation": 0}, languages=["zh"], seed=1)
    assert person_messages(first)[0] == person_messages(second)[0]
    asked = person_messages(first)[1].text
    assert first.name in asked and str(first.age) in asked and all(trait in asked for trait in first.traits)
    sheet = {"character": "你写{theme}。", "days": "你种花。", "speech": "你话少。"}
    subject = seeds.subject(first, draw=0, seed=1)
    asked = scene_messages(first, sheet, subject)[1].text
    assert "你写{theme}。" in asked and subject.theme in asked and subject.spark in asked


# The checks


@pytest.mark.parametrize("language", ["en", "zh"])
def test_whole_answers_are_taken(language):
    rng = random.Random(language)
    sheet, story = person(rng, language), scene(rng, language)
    assert parse_person(json.dumps(sheet), language, "Dana Kowal") == sheet
    assert parse_scene(json.dumps(story), language) == story


def test_hand_written_scenes_are_taken():
    reaction = (
        "You close up when somebody speaks of themselves. You go on when a reply keeps to what you said."
    )
    for situation in load_situations():
        fields = {
            key: getattr(situation, key)
            for key in ("topic", "cause", "timeline", "people", "now", "hides", "facts")
        }
        said = {
            "tried": situation.failed,
            "reaction": reaction,
            "opening": situation.openings[Temperament.PASSIVE],
        }
        for want in situation.wants.values():
            parse_scene(json.dumps(fields | said | {"want": want}), "en")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"facts": ["I am short."] * 8}, Reason.SCHEMA),
        ({"mood": "blue"}, Reason.SCHEMA),
        ({"topic": 7}, Reason.SCHEMA),
        ({"cause": "You" + " are" * 400}, Reason.SCHEMA),
        ({"hides": "You are ashamed of [something] that you once did."}, Reason.PLACEHOLDER),
        ({"now": "你" * 600}, Reason.LANGUAGE),
        ({"facts": ["I still have the receipt at home."] * 8}, Reason.REPETITIVE),
        (
            {
                "tried": [
                    "You wrote to her, and she did not answer.",
                    "You wrote to her; and she did not answer!",
                ]
            },
            Reason.REPETITIVE,
        ),
        ({"reaction": "She asks for patience and goes home before anybody else has come."}, Reason.VOICE),
        (
            {
                "facts": [
                    f"They kept the letter for {n} years."
                    for n in "one two three four five six seven eight".split()
                ]
            },
            Reason.VOICE,
        ),
        (
            {
                "want": "You hope that she will say sorry",
                "now": "Today you hope that she will say sorry to you.",
            },
            Reason.INTENT_TOLD,
        ),
    ],
)
def test_what_a_scene_must_not_be(change, reason):
    with pytest.raises(RejectedError) as caught:
        parse_scene(json.dumps(scene(random.Random(0)) | change), "en")
    assert caught.value.reason is reason and "\n" not in caught.value.detail


@pytest.mark.parametrize(
    "change, detail",
    [
        ({"character": "You like tea. " * 20}, "repetitive"),
        (
            {
                "days": (
                    "A baker begins at three, and nobody who sleeps knows what the streets of a town look "
                    "like by then."
                )
            },
            "days: does not",
        ),
        (
            {"speech": "You are Dana, who speaks in short sentences and leaves out the end of most."},
            "speech: speaks of the person by name",
        ),
    ],
)
def test_what_a_person_sheet_must_not_be(change, detail):
    with pytest.raises(RejectedError, match=detail):
        parse_person(json.dumps(person(random.Random(0)) | change), "en", "Dana Kowal")


@pytest.mark.parametrize("text", ["", "Sure! Here is the scene:", '{"topic": "a', "[" * 100_000])
def test_what_is_no_json_is_rejected(text):
    with pytest.raises(RejectedError) as caught:
        parse_scene(text, "en")
    assert caught.value.reason is Reason.NOT_JSON


def test_a_wish_told_in_chinese_is_found():
    fields = scene(random.Random(0), "zh")
    fields["want"] = "你希望有人夸你那天夜里一个人把车推回来了"
    fields["opening"] = "我希望有人夸你那天夜里一个人把车推回来了，可是没有。"
    with pytest.raises(RejectedError) as caught:
        parse_scene(json.dumps(fields), "zh")
    assert caught.value.reason is Reason.INTENT_TOLD


def test_chinese_texts_are_shorter():
    english, chinese = (scene_schema(language)["properties"]["cause"] for language in ("en", "zh"))
    assert (english["minLength"], english["maxLength"], chinese["minLength"], chinese["maxLength"]) == (
        120,
        1200,
        40,
        400,
    )


# Near duplicates


def test_minilm_tells_the_banks_situations_apart():
    bank = load_split("bank", "evaluation")
    first = bank[0]
    retold = next(p for p in bank if p.situation_id == first.situation_id and p is not first)
    other = next(p for p in bank if p.situation_id != first.situation_id)
    encoder = SentenceEncoder()
    vectors = [
        english_vector(p.scene, lambda texts: encoder.vectors(texts).numpy()) for p in (first, retold, other)
    ]
    assert vectors[0] @ vectors[1] > MOST_SIMILAR["en"] > vectors[0] @ vectors[2]


def test_chinese_vectors_see_shared_runs():
    # "ab" and "abab": runs ab | ab ab-twice ba aba bab; by hand (1) . (1 + ln 2, 1, 1, 1) / |..| = 1.6931 /
    # sqrt(2.8668 + 3)
    assert float(chinese_vector("你我") @ chinese_vector("你我你我")) == pytest.approx(
        1.6931 / 5.8668**0.5, abs=1e-3
    )


def test_another_name_makes_no_other_person():
    index = Index(embed)
    index.add(
        "a", index.vector("Dana Kowal sells tickets. Dana waits.", language="en", name="Dana Kowal"), "en"
    )
    twin = index.vector("Mei Zhou sells tickets. Mei waits.", language="en", name="Mei Zhou")
    assert index.nearest(twin, "en") == (1.0, "a") and index.nearest(twin, "zh") == (-1.0, "")
    assert index.closest("en", of=lambda _: True, among=lambda _: True) == []


# The build


def test_a_build_is_whole_balanced_and_loads(tmp_path, capsys):
    model = Scripted()
    assert run(tmp_path, model, "--train", "48", "--evaluation", "24") == 0
    train, evaluation = (
        load_split(str(tmp_path / f"{split}.jsonl"), split) for split in ("train", "evaluation")
    )
    check_personas([*train, *evaluation])
    for personas in (train[:24], train[24:], evaluation):
        assert {(p.hidden_intent, p.temperament) for p in personas} == set(CELLS)
    assert all(
        p.profile.startswith(f"You are {p.name}, ") and p.want not in p.scene and len(p.facts) == 8
        for p in train
    )
    report = report_of(tmp_path)
    assert report["missing"] == [] and set(report["shared_by_splits"].values()) == {0}
    assert report["splits"]["train"]["cell_min"] == report["splits"]["train"]["cell_max"] == 2
    keys, sampling = ({getattr(request, name) for request in model.requests} for name in ("key", "seed"))
    assert len(model.requests) == len(keys) == len(sampling) == 144
    # 144 calls of 60 fresh, 40 cached and 30 sampled tokens: 144 * (120 + 40 + 300) / 10^6.
    assert report["cost"]["cost"] == pytest.approx(0.06624) and report["cost"][
        "cost_per_1000_personas"
    ] == pytest.approx(0.92)
    assert report["cost"]["tokens_per_persona"] == 260 and report["cost"]["models"] == {"scripted": 144}
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_both_languages_share_the_splits(tmp_path):
    assert run(tmp_path, Scripted(), "--train", "9", "--evaluation", "4", "--languages", "en,zh") == 0
    splits = report_of(tmp_path)["splits"]
    assert splits["train"]["languages"] == {"en": 5, "zh": 4} and splits["evaluation"]["languages"] == {
        "en": 2,
        "zh": 2,
    }
    chinese = [p for p in load_split(str(tmp_path / "train.jsonl"), "train") if p.language == "zh"]
    assert all(p.profile.startswith(f"你叫{p.name}，") and " " not in p.scene for p in chinese)


def test_a_rejected_answer_is_asked_for_again_with_another_seed(tmp_path):
    model = Scripted(lambda request: "no" if request.key.endswith("/0") else None)
    assert run(tmp_path, model, "--train", "2", "--evaluation", "0") == 0
    assert len(model.requests) == len({request.seed for request in model.requests}) == 8
    rejected = report_of(tmp_path)["rejected"]
    assert [rejected[step]["reasons"] for step in ("person", "scene")] == [{"not_json": 2}, {"not_json": 2}]
    assert not (tmp_path / "evaluation.jsonl").exists()


def test_a_scene_like_another_is_rejected_and_gets_another_theme(tmp_path):
    same = json.dumps(scene(random.Random(0)))
    model = Scripted(lambda request: same if request.key.endswith("scene/0") else None)
    assert run(tmp_path, model, "--train", "2", "--evaluation", "0", "--concurrency", "1") == 0
    second = [r for r in model.requests if r.key.startswith("train-en-0002/scene")]
    slot = seeds.plan(sizes={"train": 2, "evaluation": 0}, languages=["en"], seed=1)[1]
    assert [
        seeds.subject(slot, draw=n, seed=1).theme in r.messages[1].text for n, r in enumerate(second)
    ] == [True, True]
    assert report_of(tmp_path)["rejected"]["scene"]["examples"] == {
        "near_duplicate": ["train-en-0002: 1.00 to train-en-0001"]
    }


def test_an_evaluation_person_like_a_training_person_is_rejected(tmp_path):
    same = json.dumps(person(random.Random(0)))
    model = Scripted(lambda request: same if "/person/" in request.key else None)
    assert (
        run(tmp_path, model, "--train", "1", "--evaluation", "1", "--attempts", "3", "--concurrency", "1")
        == 1
    )
    report = report_of(tmp_path)
    assert report["missing"] == ["evaluation-en-0001"] and report["rejected"]["person"]["reasons"] == {
        "near_duplicate": 3
    }
    assert len(load_split(str(tmp_path / "train.jsonl"), "train")) == 1


def test_an_opening_word_for_word_like_another_is_rejected(tmp_path):
    opening = prose(random.Random(0), "en", 60, "I")

    def twice(request):
        return (
            json.dumps(scene(random.Random(request.key)) | {"opening": opening})
            if request.key.endswith("scene/0")
            else None
        )

    assert run(tmp_path, Scripted(twice), "--train", "2", "--evaluation", "0") == 0
    assert report_of(tmp_path)["rejected"]["scene"]["reasons"] == {"near_duplicate": 1}


@pytest.mark.parametrize("torn", [b"", b'{"slot": "train-en-0'])
def test_an_interrupted_build_goes_on(tmp_path, torn):
    budget = Counter()

    def spend(request):
        budget["calls"] += 1
        return BudgetError("used up") if budget["calls"] > 7 else None

    first, second = Scripted(spend), Scripted()
    with pytest.raises(BudgetError):
        run(tmp_path, first, "--train", "8", "--evaluation", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(torn)
    assert run(tmp_path, second, "--train", "8", "--evaluation", "2") == 0
    assert len(second.requests) == 20 - 7
    assert not {r.key for r in first.requests[:7]} & {r.key for r in second.requests}
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert (
        run(
            tmp_path,
            Scripted(lambda request: AssertionError("nothing is left to ask")),
            "--train",
            "8",
            "--evaluation",
            "2",
        )
        == 0
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_a_resumed_build_equals_one_that_was_never_stopped(tmp_path):
    def stop(request):
        return BudgetError("used up") if request.key.startswith("train-en-0003/scene") else None

    options = ("--train", "6", "--evaluation", "0", "--concurrency", "1")
    run(tmp_path / "whole", Scripted(), *options)
    with pytest.raises(BudgetError):
        run(tmp_path / "stopped", Scripted(stop), *options)
    run(tmp_path / "stopped", Scripted(), *options)
    assert (tmp_path / "stopped" / "train.jsonl").read_bytes() == (
        tmp_path / "whole" / "train.jsonl"
    ).read_bytes()


def test_what_is_missing_is_tried_again_with_new_attempts(tmp_path):
    model = Scripted(lambda request: "no" if request.key.startswith("train-en-0002/scene") else None)
    assert run(tmp_path, model, "--train", "3", "--evaluation", "0", "--attempts", "2") == 1
    assert (
        report_of(tmp_path)["missing"] == ["train-en-0002"]
        and len(load_split(str(tmp_path / "train.jsonl"), "train")) == 2
    )
    again = Scripted()
    assert run(tmp_path, again, "--train", "3", "--evaluation", "0", "--attempts", "2") == 0
    assert [request.key for request in again.requests] == ["train-en-0002/scene/2"]


def test_failed_calls_are_tried_again_and_a_dead_backend_stops_the_build(tmp_path):
    flaky = Scripted(lambda request: BoundaryError("cut\noff") if request.key.endswith("/0") else None)
    assert run(tmp_path / "flaky", flaky, "--train", "2", "--evaluation", "0", "--concurrency", "1") == 0
    assert (
        report_of(tmp_path / "flaky")["rejected"]["person"]["examples"]["call_failed"][0]
        == "train-en-0001: cut off"
    )
    dead = Scripted(lambda request: BoundaryError("no answer"))
    with pytest.raises(BoundaryError, match="10 calls failed in a row, the last: no answer"):
        run(tmp_path / "dead", dead, "--train", "20", "--evaluation", "0")
    assert len(dead.requests) < 20


def test_a_folder_of_another_build_is_refused(tmp_path):
    run(tmp_path, Scripted(), "--train", "1", "--evaluation", "0")
    with pytest.raises(
        DataError, match=r"journal\.jsonl: holds a build with seed=1, not 2; use another --out"
    ):
        run(tmp_path, Scripted(), "--train", "1", "--evaluation", "0", "--seed", "2")
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    with pytest.raises(DataError, match=r"journal\.jsonl:4: damaged"):
        run(tmp_path, Scripted(), "--train", "1", "--evaluation", "0")


def test_one_build_at_a_time(tmp_path):
    with (
        Journal(tmp_path / "journal.jsonl", {}),
        pytest.raises(DataError, match="another build is writing there"),
    ):
        Journal(tmp_path / "journal.jsonl", {})


# The command line


def test_options_of_the_chat_model_are_those_of_training():
    config = simulator_config(
        ["simulator=openai", "simulator.openai.model=m", "simulator.openai.timeout_s=5"]
    )
    assert (config.backend.value, config.openai.model, config.openai.timeout_s) == ("openai", "m", 5.0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "simulator.backend=embedded: rules write no personas"),
        (["simulator=vllm", "simulator.engine.modle=x"], "Key 'modle' not in 'UserEngineConfig'"),
        (["simulator=gpt"], "gpt"),
        (["simulator=openai"], "simulator.openai.model"),
        (["model.path=x"], "model.path=x: not an option of the chat model"),
        (
            ["simulator=openai", "simulator.llm.calls=one"],
            "simulator.llm.calls=one: not an option of the chat model that writes; use simulator.backend=",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        simulator_config(overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [["--languages", "en,fr"], ["--languages", "en,en"], ["--attempts", "0"], ["--train", "-1"]]
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--out", "x", *arguments])
    assert arguments[0] in capsys.readouterr().err
