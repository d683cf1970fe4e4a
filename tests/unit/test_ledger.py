"""The ledger gives back what was written, and ties appraisals to their inputs."""

import hashlib
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlver_dist.dialogue import Appraisal, Dialogue, EndReason, Message, Role, Turn
from rlver_dist.errors import DataError
from rlver_dist.ledger.parquet import (
    SCHEMA,
    SCHEMA_VERSION,
    VERSION_KEY,
    dialogues_path,
    drop_later,
    read_dialogues,
    read_records,
    write_dialogues,
)
from rlver_dist.ledger.records import Phase, appraisal_hashes, input_hash
from tests.unit import builders

TEXT = st.text(max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4)
APPRAISALS = st.builds(
    Appraisal,
    content=TEXT,
    fit=TEXT,
    activity=TEXT,
    feeling=TEXT,
    change=NUMBER,
    features=st.dictionaries(TEXT, NUMBER, max_size=3),
    source=TEXT,
)
TURNS = st.builds(
    Turn,
    index=st.integers(0, 100),
    prompt_ids=IDS,
    reply_ids=IDS,
    logprobs=st.lists(NUMBER, max_size=4),
    reply=TEXT,
    thinking=TEXT,
    thinking_tokens=st.integers(0, 4),
    well_formed=st.booleans(),
    truncated=st.booleans(),
    emotion_before=NUMBER,
    emotion_after=NUMBER,
    appraisal=st.none() | APPRAISALS,
    user_message=st.none() | TEXT,
    policy_version=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
)
DIALOGUES = st.builds(
    Dialogue,
    id=st.uuids().map(str),
    persona_id=TEXT,
    group_id=TEXT,
    seed=st.integers(-(2**63), 2**63 - 1),
    opening=TEXT,
    start_emotion=NUMBER,
    turns=st.lists(TURNS, max_size=3),
    end_reason=st.sampled_from(EndReason),
    final_emotion=NUMBER,
    error=st.none() | TEXT,
)


def make_dialogue(name: str = "d") -> Dialogue:
    appraisal = Appraisal(
        content="c", fit="f", activity="a", feeling="f", change=8.0, features={"need": 0.25}
    )
    shared = {"logprobs": [-0.5], "emotion_after": 38.0, "policy_version": (0, 1)}
    turns = [
        builders.turn(0, reply="one", appraisal=appraisal, user_message="and then", **shared),
        builders.turn(1, reply="two", emotion_before=38.0, **shared),
    ]
    return builders.dialogue(
        turns, id=name, seed=5, opening="hello", end_reason=EndReason.OVER_LONG, final_emotion=38.0
    )


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(dialogues=st.lists(DIALOGUES, max_size=3, unique_by=lambda dialogue: dialogue.id), reward=NUMBER)
def test_round_trip(tmp_path, dialogues, reward):
    path = tmp_path / "train_000001.parquet"
    scored = {dialogue.id: reward for dialogue in dialogues[:1]}
    write_dialogues(path, dialogues, iteration=1, phase="train", rewards=scored)
    assert read_dialogues(path) == dialogues
    assert [record.reward for record in read_records(path)] == [
        scored.get(dialogue.id) for dialogue in dialogues
    ]


def test_records_hold_what_the_run_made_of_a_dialogue(tmp_path):
    path = dialogues_path(tmp_path, phase="train", iteration=3)
    dialogues = [make_dialogue("a"), make_dialogue("b")]
    write_dialogues(
        path, dialogues, iteration=3, phase="train", rewards={"a": 0.38, "b": 0.4}, advantages={"b": -1.5}
    )
    first, second = read_records(path)
    assert path.relative_to(tmp_path).as_posix() == "dialogues/train_000003.parquet"
    assert (first.iteration, first.phase, first.reward, first.advantage) == (3, Phase.train, 0.38, None)
    assert (second.reward, second.advantage) == (0.4, -1.5)
    assert first.appraisal_inputs == appraisal_hashes(make_dialogue("a"))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_appraisal_hash_by_hand():
    hashes = appraisal_hashes(make_dialogue())
    assert hashes == [hashlib.sha256(b'["p",[["user","hello"],["assistant","one"]]]').hexdigest(), None]


def test_hash_changes_with_persona_and_every_message():
    heard = [Message(role=Role.USER, text="hello"), Message(role=Role.ASSISTANT, text="one")]
    others = [
        ("q", heard),
        ("p", heard[:1]),
        ("p", [heard[0], Message(role=Role.ASSISTANT, text="one ")]),
        ("p", heard[::-1]),
    ]
    hashes = {input_hash(persona_id, messages) for persona_id, messages in [("p", heard), *others]}
    assert len(hashes) == 5


def test_hash_of_a_later_turn_covers_the_whole_talk():
    dialogue = make_dialogue()
    dialogue.turns[1] = replace(dialogue.turns[1], appraisal=dialogue.turns[0].appraisal)
    assert appraisal_hashes(dialogue)[1] == input_hash("p", dialogue.messages())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "train_000001.parquet"
    write_dialogues(path, [make_dialogue()], iteration=1, phase="train", rewards={})
    broken = replace(make_dialogue(), opening="\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_dialogues(path, [broken], iteration=1, phase="train", rewards={})
    assert read_dialogues(path) == [make_dialogue()]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_cannot_be_renamed_leaves_nothing_behind(tmp_path):
    path = tmp_path / "train_000001.parquet"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_dialogues(path, [make_dialogue()], iteration=1, phase="train", rewards={})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_ids_and_rewards_are_checked(tmp_path):
    path = tmp_path / "before_000000.parquet"
    with pytest.raises(ValueError, match="2 dialogues with 1 ids"):
        write_dialogues(path, [make_dialogue(), make_dialogue()], iteration=0, phase="before", rewards={})
    with pytest.raises(ValueError, match="not written: z"):
        write_dialogues(path, [make_dialogue()], iteration=0, phase="before", rewards={"z": 1.0})
    assert not path.exists()


def test_unreadable_files_are_named_with_a_way_out(tmp_path):
    missing, foreign, newer = (
        tmp_path / "missing.parquet",
        tmp_path / "foreign.parquet",
        tmp_path / "newer.parquet",
    )
    foreign.write_text("not parquet")
    pq.write_table(
        pa.Table.from_pylist(
            [], schema=SCHEMA.with_metadata({VERSION_KEY: str(SCHEMA_VERSION + 1).encode()})
        ),
        newer,
    )
    unreadable = "not a readable dialogue file"
    for path, complaint in (
        (missing, unreadable),
        (foreign, unreadable),
        (newer, f"schema version {SCHEMA_VERSION + 1}"),
    ):
        with pytest.raises(DataError, match=f"{path.name}: .*{complaint}") as raised:
            read_dialogues(path)
        assert "\n" not in str(raised.value)


def test_folder_names_add_no_columns(tmp_path):
    path = tmp_path / "lr=3" / "train_000001.parquet"
    write_dialogues(path, [make_dialogue()], iteration=1, phase="train", rewards={})
    assert read_dialogues(path) == [make_dialogue()]


def test_later_iterations_are_dropped_and_everything_else_stays(tmp_path):
    drop_later(tmp_path, 3)  # There may be no ledger yet.
    written = [
        ("control", 0),
        ("before", 0),
        ("train", 1),
        ("train", 3),
        ("after", 3),
        ("train", 4),
        ("train", 1_000_000),
        ("after", 4),
    ]
    for phase, iteration in written:
        path = dialogues_path(tmp_path, phase=phase, iteration=iteration)
        write_dialogues(path, [make_dialogue()], iteration=iteration, phase=phase, rewards={})
    for name in ("train_best.parquet", "notes_000009.parquet", "train_000009.csv"):
        (tmp_path / "dialogues" / name).write_text("somebody's own")
    drop_later(tmp_path, 3)
    kept = {
        dialogues_path(tmp_path, phase=phase, iteration=iteration).name for phase, iteration in written[:5]
    }
    kept |= {"train_best.parquet", "notes_000009.parquet", "train_000009.csv"}
    assert {path.name for path in (tmp_path / "dialogues").iterdir()} == kept
