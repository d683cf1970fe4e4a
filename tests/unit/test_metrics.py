"""Reduction of metric records, the metrics of dialogues, and metrics.jsonl."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.dialogue import Dialogue, EndReason, Turn
from rlver_dist.errors import DataError
from rlver_dist.tracking.dialogue_metrics import dialogue_metrics, distinct_n
from rlver_dist.tracking.jsonl import JsonlTracker, read_metrics
from rlver_dist.tracking.metrics import NON_FINITE, Metric, Reduction, reduce_metrics
from tests.unit import builders


def make_turn(
    index: int, reply: str, num_tokens: int, before: float, after: float, *, appraised: bool = True
) -> Turn:
    return builders.turn(
        index,
        prompt_ids=[1, 2],
        reply_ids=[3] * num_tokens,
        reply=reply,
        well_formed=appraised,
        truncated=not appraised,
        emotion_before=before,
        emotion_after=after,
        appraisal=builders.appraisal(after - before) if appraised else None,
    )


def make_dialogue(name: str, turns: list[Turn], end_reason: EndReason, final_emotion: float) -> Dialogue:
    return builders.dialogue(turns, id=name, end_reason=end_reason, final_emotion=final_emotion)


def test_mean_is_weighted_and_not_a_mean_of_means():
    shards = [Metric("learner/loss", 1.0, Reduction.mean, 1), Metric("learner/loss", 5.0, Reduction.mean, 3)]
    assert reduce_metrics(shards) == {"learner/loss": 4.0, NON_FINITE: 0.0}


def test_max_sum_and_last():
    others = (Reduction.max, Reduction.sum, Reduction.last)
    records = [
        Metric(f"g/{reduction.value}", value, reduction) for reduction in others for value in (2.0, 7.0, 3.0)
    ]
    assert reduce_metrics(records) == {"g/max": 7.0, "g/sum": 12.0, "g/last": 3.0, NON_FINITE: 0.0}


def test_one_key_with_two_reductions_is_refused():
    with pytest.raises(ValueError, match=r"time/sync_s: reported with reductions mean and max"):
        reduce_metrics([Metric("time/sync_s", 1, Reduction.mean), Metric("time/sync_s", 1, Reduction.max)])


@pytest.mark.parametrize("reduction", [Reduction.mean, Reduction.max, Reduction.sum])
@pytest.mark.parametrize("bad_first", [True, False])
def test_nan_stays_and_is_counted(reduction, bad_first):
    values = [math.nan, 1.0] if bad_first else [1.0, math.nan]
    reduced = reduce_metrics([Metric("k", value, reduction) for value in values])
    assert math.isnan(reduced["k"])
    assert reduced[NON_FINITE] == 1


def test_infinities_of_both_signs_reduce_to_nan():
    reduced = reduce_metrics([Metric("k", math.inf, Reduction.mean), Metric("k", -math.inf, Reduction.mean)])
    assert math.isnan(reduced["k"])
    assert reduced[NON_FINITE] == 2


def test_mean_of_nothing_is_nan_and_is_no_defect():
    reduced = reduce_metrics([Metric("k", 0.0, Reduction.mean, weight=0)])
    assert math.isnan(reduced["k"])
    assert reduced[NON_FINITE] == 0


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weight_is_checked(weight):
    with pytest.raises(ValueError, match="metric k: weight"):
        Metric("k", 1.0, Reduction.mean, weight)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), data=st.data())
def test_mean_does_not_depend_on_the_shards(values, data):
    cut = data.draw(st.integers(0, len(values)))
    shards = [part for part in (values[:cut], values[cut:]) if part]
    reduced = reduce_metrics(
        [Metric("k", sum(part) / len(part), Reduction.mean, len(part)) for part in shards]
    )
    assert reduced["k"] == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-6)


def test_dialogue_metrics_by_hand():
    turns = [
        replace(make_turn(0, "so it goes", 10, 30, 38), thinking="you need me"),
        replace(make_turn(1, "so it goes", 20, 38, 100), thinking="you need you need", thinking_tokens=9),
    ]
    left_content = make_dialogue("a", turns, EndReason.EMOTION_HIGH, 100)
    broken = make_dialogue("b", [make_turn(0, "", 6, 30, 30, appraised=False)], EndReason.MALFORMED, 8)
    failed = make_dialogue("c", [make_turn(0, "lost words", 99, 30, 90)], EndReason.INFRASTRUCTURE, 90)
    reduced = reduce_metrics(dialogue_metrics([left_content, broken, failed], {"a": 1.0, "b": 0.0}))
    expected = {
        "rollout/dialogues": 3,
        "rollout/failed": 1,
        "rollout/turns_per_dialogue": 1.5,
        "rollout/reply_tokens": 12,
        "rollout/thinking_tokens": 3,
        "rollout/truncated_share": 1 / 3,
        "rollout/well_formed_share": 2 / 3,
        "rollout/distinct2": 0.5,
        # Bigrams (you need) three times, (need me), (need you).
        "rollout/thinking_distinct2": 3 / 5,
        "rollout/end_emotion_high": 1 / 3,
        "rollout/end_malformed": 1 / 3,
        "rollout/end_infrastructure": 1 / 3,
        "rollout/end_goodbye": 0,
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "reward/emotion_final": 54,
        "reward/emotion_change_per_turn": 35,
        "reward/success_share": 0.5,
        "reward/failure_share": 0.5,
        NON_FINITE: 0,
    }
    assert {key: reduced[key] for key in expected} == pytest.approx(expected)
    assert sum(value for key, value in reduced.items() if key.startswith("rollout/end_")) == pytest.approx(1)


def test_dialogues_that_ended_before_a_reply_count_as_ended():
    overflowed = make_dialogue("a", [], EndReason.CONTEXT_OVERFLOW, 30)
    spoken = make_dialogue("b", [make_turn(0, "hm", 5, 30, 40)], EndReason.MAX_TURNS, 40)
    reduced = reduce_metrics(dialogue_metrics([overflowed, spoken], {"b": 0.4}))
    expected = {
        "rollout/end_context_overflow": 0.5,
        "rollout/turns_per_dialogue": 0.5,
        "rollout/failed": 0,
        "reward/emotion_final": 35,
    }
    assert {key: reduced[key] for key in expected} == pytest.approx(expected)


def test_dialogue_metrics_where_everything_failed():
    reduced = reduce_metrics(dialogue_metrics([make_dialogue("a", [], EndReason.INFRASTRUCTURE, 30)], {}))
    assert reduced["rollout/failed"] == 1
    assert math.isnan(reduced["reward/mean"])


def test_dialogue_metrics_refuses_a_reward_without_dialogue():
    with pytest.raises(ValueError, match="rewards for dialogues that are not there: x"):
        dialogue_metrics([], {"x": 1.0})


def test_every_key_written_in_the_code_is_documented():
    root = Path(__file__).parents[2]
    literal = re.compile(
        r'"((?:rollout|reward|guard|judges|simulator|learner|critic|warm_up|sync|time|perf|progress)/[a-z0-9_]+)"'
    )
    keys = {
        key
        for source in (root / "rlver_dist").rglob("*.py")
        for key in literal.findall(source.read_text(encoding="utf-8"))
    }
    documented = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert "reward/emotion_final" in keys
    assert not {key for key in keys if f"`{key}`" not in documented}


def test_distinct_n_by_hand():
    # Bigrams: (a b) (b a) (a b) and (a b); none spans the texts.
    assert distinct_n(["A b a B", "a b"]) == 2 / 4
    assert distinct_n(["a b a b"], n=1) == 2 / 4
    assert distinct_n(["word", ""]) == 0


def test_jsonl_resume_drops_repeated_iterations_and_a_cut_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path, first_iteration=1)
    for iteration in (1, 2, 3):
        tracker.log(iteration, {"reward/mean": iteration / 10, "learner/loss": math.nan})
    tracker.close()
    assert json.loads(path.read_text().splitlines()[0]) == {
        "iteration": 1,
        "reward/mean": 0.1,
        "learner/loss": None,
    }
    with path.open("a") as file:
        file.write('{"iteration": 4, "rew')
    resumed = JsonlTracker(path, first_iteration=3)
    resumed.log(3, {"reward/mean": 0.9})
    resumed.close()
    records = read_metrics(path)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert records[2]["reward/mean"] == 0.9
    assert math.isnan(records[0]["learner/loss"])
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{oops}", '{"reward/mean": 1}', "[1]"])
def test_jsonl_names_the_line_that_it_cannot_read(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{line}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: .*mend or delete the line"):
        JsonlTracker(path, first_iteration=2)
    assert path.read_text().startswith('{"iteration": 1}\n')


def test_read_metrics_of_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
