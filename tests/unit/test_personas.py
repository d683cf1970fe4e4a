# ruff: noqa: RUF001
"""Reading and writing personas: this project's JSONL and RLVER's."""

import json
from pathlib import Path

import pytest

from rlver_dist import launch
from rlver_dist.config.data import DataConfig
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.data.personas import dump_personas, leak_notice, load_personas, load_split
from rlver_dist.data.rlver import split_marker
from rlver_dist.errors import DataError

OWN_PROFILES = Path(__file__).parents[1] / "data" / "rlver_profiles.jsonl"
"""Written for these tests, with what makes RLVER's rows hard to read."""
RELEASED_PROFILES = Path(__file__).parents[3] / "shared" / "data" / "rlver_profiles_sample.jsonl"
"""Rows of RLVER's own file, which the project does not ship."""
PROFILES = [path for path in (OWN_PROFILES, RELEASED_PROFILES) if path == OWN_PROFILES or path.is_file()]
OWN = {
    "id": "p1",
    "name": "Dana Kowal",
    "profile": "You are Dana Kowal, 34, a bus driver.",
    "scene": "The bus was late.",
    "temperament": "passive",
    "hidden_intent": "be_heard",
    "want": "You want to be heard.",
}
RLVER = {
    "id": "r1",
    "player": "* 姓名：林晓  \n* 年龄：31岁\n* 职业：厨师",
    "scene": (
        "## 背景\n\n林晓的餐馆上个月关门了。\n\n- **NPC贴合角色隐藏主题的回复**\n  林晓会更愿意说下去。\n"
        "####隐藏主题:\n***你希望对方用心倾听你的情绪宣泄"
    ),
    "main_cha": "回避型",
    "cha_group": ["内向", "谨慎", "敏感"],
    "task": "你希望对方用心倾听你的情绪宣泄",
}
TASKS = {
    "你希望对方辩证地看这件事": HiddenIntent.BALANCED_VIEW,
    "你想得到真正有用的建议": HiddenIntent.PRACTICAL_ADVICE,
    "你想弄清其他人物为什么这么做": HiddenIntent.UNDERSTAND_OTHERS,
    "你希望对方引导你自我反思": HiddenIntent.SELF_REFLECTION,
    "你希望对方真诚地夸奖你": HiddenIntent.PRAISE,
    "你希望有人听你的情绪宣泄": HiddenIntent.BE_HEARD,
    "你希望对方深刻共情你": HiddenIntent.DEEP_EMPATHY,
    "你要对方也认同你没有错": HiddenIntent.NO_FAULT,
}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "people.jsonl"
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows),
        encoding="utf-8",
    )
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_personas(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_short_row_takes_the_defaults(tmp_path):
    assert load_personas(write(tmp_path, OWN, "")) == [
        Persona(
            id="p1",
            name="Dana Kowal",
            profile=OWN["profile"],
            scene=OWN["scene"],
            temperament=Temperament.PASSIVE,
            traits=(),
            hidden_intent=HiddenIntent.BE_HEARD,
            want=OWN["want"],
            hides="",
            language="en",
            topic="",
            situation_id="p1",
            opening="",
            facts=(),
        )
    ]


def test_what_is_written_is_read_again(tmp_path):
    personas = load_split("bank", "evaluation")
    path = tmp_path / "copy.jsonl"
    path.write_text(dump_personas(personas), encoding="utf-8")
    assert load_personas(path) == personas == load_split(str(path), "train")


def test_line_separators_inside_a_text_do_not_cut_the_row(tmp_path):
    assert load_personas(write(tmp_path, OWN | {"scene": "one\u2028two"}))[0].scene == "one\u2028two"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mood": "blue"}, "mood: unknown field; known are id,"),
        ({"temperament": "jolly"}, "temperament: 'jolly' is unknown; use one of negative, passive, avoidant"),
        ({"hidden_intent": "money"}, "hidden_intent: 'money' is unknown; use one of balanced_view,"),
        ({"name": ""}, "name: is empty"),
        ({"want": None}, "want: None is not a text"),
        ({"facts": "a fact"}, "facts: 'a fact' is not a list of texts"),
        ({"traits": ["shy", 3]}, "traits: ['shy', 3] is not a list of texts"),
        ({"id": "p0"}, "id: 'p0' is already used in line 1"),
    ],
)
def test_bad_rows_are_refused_with_file_line_and_field(tmp_path, change, message):
    path = write(tmp_path, OWN | {"id": "p0"}, OWN | change)
    assert refusal(path).startswith(f"{path}:2: {message}")


def test_a_missing_field_is_named(tmp_path):
    path = write(tmp_path, {key: value for key, value in OWN.items() if key != "scene"})
    assert refusal(path).startswith(f"{path}:1: scene: missing")


@pytest.mark.parametrize(
    "line, message", [('{"id": ', "not JSON"), ("[1, 2]", "holds a list"), ("", "holds no persona")]
)
def test_what_is_no_persona_is_refused(tmp_path, line, message):
    assert message in refusal(write(tmp_path, line))


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"id": "Jos\xe9"}'.encode("latin-1"))
    assert "not UTF-8" in refusal(latin)


def test_half_a_character_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, OWN, json.dumps(OWN | {"id": "b", "opening": "Well \ud83d"}))
    assert refusal(path).startswith(f"{path}:2: opening: holds half a character ('\\ud83d')")


def test_an_rlver_row_is_imported(tmp_path):
    (persona,) = load_personas(write(tmp_path, RLVER))
    assert (persona.id, persona.situation_id, persona.name, persona.language) == ("r1", "r1", "林晓", "zh")
    assert (persona.temperament, persona.hidden_intent) == (Temperament.AVOIDANT, HiddenIntent.BE_HEARD)
    assert persona.traits == ("内向", "谨慎", "敏感")
    assert (
        persona.scene.endswith("林晓会更愿意说下去。") and persona.want == RLVER["task"] not in persona.scene
    )
    assert (persona.topic, persona.opening, persona.facts) == ("", "", ())


def test_topic_and_first_talk_are_kept_where_present(tmp_path):
    (persona,) = load_personas(write(tmp_path, RLVER | {"topic": "工作", "first_talk": "唉，最近好烦。"}))
    assert (persona.topic, persona.opening) == ("工作", "唉，最近好烦。")


@pytest.mark.parametrize("task", TASKS)
def test_all_eight_rlver_intents_are_recognised(tmp_path, task):
    assert load_personas(write(tmp_path, RLVER | {"task": task}))[0].hidden_intent is TASKS[task]


@pytest.mark.parametrize(
    "marker",
    [
        "####隐藏主题:\n***愿望",
        "## 隐藏主题：\n愿望",
        "**隐藏主题**\n\n愿望",
        "### 隐藏主题: 愿望",
        "隐藏主题：愿望",
    ],
)
def test_the_marker_is_split_off_in_every_form(marker):
    body = "## 背景\n他走了。\n\n- **NPC偏离角色隐藏主题的回复**：\n  会失望。"
    assert split_marker(f"{body}\n{marker}") == body
    assert split_marker(body) == body


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "想要钱"}, "task: '想要钱' is unknown or ambiguous"),
        ({"task": "夸奖和建议"}, "task: '夸奖和建议' is unknown or ambiguous"),
        ({"main_cha": "活泼型"}, "main_cha: '活泼型' is unknown"),
        ({"player": "一位厨师"}, "player: has no line with the name"),
        ({"scene": " "}, "scene: ' '"),
        ({"cha_group": []}, "cha_group: []"),
    ],
)
def test_bad_rlver_rows_are_refused_with_file_line_and_field(tmp_path, change, message):
    path = write(tmp_path, RLVER, RLVER | {"id": "r2"} | change)
    assert refusal(path).startswith(f"{path}:2: {message}")


def test_people_of_both_splits_are_reported_in_one_line(tmp_path):
    def rows(split: str, *sheets: str) -> list[Persona]:
        scenes = [RLVER["scene"].replace("餐馆", f"{split}{n}") for n in range(len(sheets))]
        people = [
            {"id": f"{split}{n}", "player": sheet, "scene": scenes[n]} for n, sheet in enumerate(sheets)
        ]
        return load_personas(write(tmp_path, *(RLVER | row for row in people)))

    ann, bo, cy = (f"* 姓名：{name}\n* 年龄：30岁 Engineer" for name in ("安", "博", "岑"))
    # As people read them: white space and capitals make no difference.
    train, evaluation = rows("t", ann, ann, bo), rows("e", ann, bo.upper(), ann + " \n", cy)
    notice = leak_notice(train, evaluation)
    assert notice is not None and "\n" not in notice
    assert "3 of 4 personas reuse the person sheet of a training persona (2 sheets); " in notice
    same = leak_notice([*train, *evaluation], evaluation)
    assert same is not None and "4 of 4 personas" in same and "(3 sheets), and 4 of them its scene; " in same
    assert leak_notice(train, rows("e", cy)) is None


def test_the_bank_shares_nobody():
    assert leak_notice(load_split("bank", "train"), load_split("bank", "evaluation")) is None


def test_a_run_says_at_load_that_training_people_are_evaluated(tmp_path, capsys):
    rows = [
        OWN
        | {"id": name, "scene": f"{name} was late.", "opening": "I was late.", "facts": ["I was late again."]}
        for name in "abc"
    ]
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "evaluation.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]), encoding="utf-8")
    evaluation.write_text(json.dumps(rows[2]) + "\n", encoding="utf-8")
    data = DataConfig(train=str(train), evaluation=str(evaluation))
    assert launch.run(RunConfig(data=data, evaluation=EvaluationConfig(num_personas=1), check=True)) == 0
    assert capsys.readouterr().err.startswith(
        "warning: data.evaluation: 1 of 1 personas reuse the person sheet of a training persona"
    )


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_in_rlvers_format_are_imported(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    personas = load_personas(path)
    assert [persona.id for persona in personas] == [row["id"] for row in rows]
    assert len({persona.hidden_intent for persona in personas}) == min(len(rows), len(HiddenIntent))
    for kind in Temperament:
        assert sum(persona.temperament is kind for persona in personas) == len(rows) / len(Temperament)
    for row, persona in zip(rows, personas, strict=True):
        assert persona.want == row["task"] and persona.want not in persona.scene
        assert persona.name in persona.scene and 2 <= len(persona.name) <= 4 and len(persona.traits) == 3
        # Nothing but the marker section goes, whatever the scene says of hidden themes before it.
        assert row["scene"].strip().startswith(persona.scene) and not persona.scene.endswith(("*", "#", ":"))
        assert len(row["scene"].strip()) - len(persona.scene) <= len("\n####隐藏主题:\n***") + len(
            row["task"]
        )
