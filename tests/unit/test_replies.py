"""The corpus of replies holds what docs/replies.md says, and nothing of the evaluation's users."""

from collections import Counter

import pytest

from rlver_dist.data.persona import HiddenIntent, Temperament
from rlver_dist.data.situations import load_situations
from rlver_dist.text import ngrams, words
from scripts.sample_corpus import load_corpus

SPLITS = ("train", "test")
POOR = {
    "dismissive",
    "generic_comfort",
    "wrong_time_advice",
    "about_oneself",
    "retelling",
    "lecturing",
    "over_familiar",
    "prying",
    "false_cheer",
    "flattery",
}
NUM_POOR = {"train": 1, "test": 2}


@pytest.fixture(scope="module")
def corpus():
    return {split: load_corpus(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_whole(corpus, split):
    seen = set()
    for row in corpus[split]:
        assert row["id"] == f"{row['situation_id']}/{row['turn']}" and row["id"] not in seen
        seen.add(row["id"])
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * row["turn"] + ["user"]
        assert Temperament(row["temperament"]) and HiddenIntent(row["intent"]) and row["want"]
        kinds = [reply["kind"] for reply in row["replies"]]
        assert kinds[:2] == ["good", "good"] and set(kinds[2:]) <= POOR
        assert len(set(kinds[2:])) == NUM_POOR[split] == len(kinds[2:])
        for reply in row["replies"]:
            assert reply["grade"] in ((3, 4) if reply["kind"] == "good" else (0, 1, 2))
            assert reply["second_grade"] in (0, 1, 2, 3, 4, None)
            assert 8 <= len(reply["text"].split()) <= 50
        assert 8 <= len(row["thought"].split()) <= 45


@pytest.mark.parametrize("split", SPLITS)
def test_a_talk_goes_on_from_one_of_its_good_replies(corpus, split):
    by_id = {row["id"]: row for row in corpus[split]}
    for row in corpus[split]:
        if row["turn"] > 0:
            before = by_id[f"{row['situation_id']}/{row['turn'] - 1}"]
            said = before["replies"][before["said"]]["text"]
            assert row["messages"][:-1] == [*before["messages"], {"role": "assistant", "text": said}]


def test_splits_share_no_situation_and_evaluation_is_in_none(corpus):
    situations = {split: {row["situation_id"] for row in corpus[split]} for split in SPLITS}
    assert not situations["train"] & situations["test"]
    training = {situation.id for situation in load_situations() if situation.split == "train"}
    assert situations["train"] | situations["test"] == training


def test_kinds_are_about_equally_often(corpus):
    for split in SPLITS:
        counts = Counter(
            reply["kind"] for row in corpus[split] for reply in row["replies"] if reply["kind"] in POOR
        )
        assert min(counts.values()) > 0.75 * max(counts.values())


def test_no_two_replies_are_near_duplicates(corpus):
    owner: dict[tuple[str, ...], int] = {}
    shared: Counter[tuple[int, int]] = Counter()
    texts = [reply["text"] for split in SPLITS for row in corpus[split] for reply in row["replies"]]
    for number, text in enumerate(texts):
        for gram in set(ngrams(words(text), 5)):
            if gram in owner:
                shared[owner[gram], number] += 1
            owner.setdefault(gram, number)
    close = [(texts[a], texts[b]) for (a, b), count in shared.items() if count > 8]
    assert close == []
