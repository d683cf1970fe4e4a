"""Several judges of one reply: the verdict, what is recorded of their disagreement, and who asks whom."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_dist.chat_client.protocol import ChatAnswer
from rlver_dist.config.enums import LlmCalls, Preset, SecondJudge, SimulatorBackend
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import HttpChatConfig, LlmUserConfig, SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Appraisal, Dialogue, Message, Role
from rlver_dist.errors import BoundaryError, BudgetError, ConfigError, DataError
from rlver_dist.evaluation.second_judge import judge_names, second_judge
from rlver_dist.ledger.parquet import read_dialogues, write_dialogues
from rlver_dist.simulator.llm.judges import JudgePanel, RuleJudge, combine, llm_users
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest
from rlver_dist.simulator.rules.lexical import LexicalAppraiser
from rlver_dist.simulator.suitability import check_second_judge
from rlver_dist.tracking.dialogue_metrics import dialogue_metrics
from rlver_dist.tracking.metrics import reduce_metrics
from tests.unit import builders

RULES = PRESETS[Preset.sage]
PERSONA = load_split("bank", "train")[0]


def appraisal(change: float, words: str = "", **features: float) -> Appraisal:
    return builders.appraisal(change, content=words, features=features, source=words)


def request(reply: str = "I hear you.", emotion: float = 40.0) -> UserRequest:
    messages = (Message(role=Role.USER, text="It all went wrong."), Message(role=Role.ASSISTANT, text=reply))
    return UserRequest(
        dialogue_id="d",
        turn_index=0,
        persona=PERSONA,
        messages=messages,
        emotion=emotion,
        seed=7,
        max_turns=8,
    )


class Says:
    """A judge of one opinion, or of none."""

    def __init__(self, change: float = 0.0, error: Exception | None = None, wait_s: float = 0.0) -> None:
        self.change, self.error, self.wait_s = change, error, wait_s
        self.asked: list[str] = []
        self.finished = False

    async def appraise(self, request: UserRequest) -> Appraisal:
        self.asked.append(request.dialogue_id)
        await asyncio.sleep(self.wait_s)
        self.finished = True
        if self.error:
            raise self.error
        return appraisal(self.change)

    def metrics(self) -> dict[str, float]:
        return {"asked": float(len(self.asked))}


class Model:
    """Stands in for a chat model: gives the changes of its list in turn, after `broken` answers without a
    field, and keeps what was asked."""

    def __init__(self, name: str, *changes: int, broken: int = 0) -> None:
        self.name, self.changes, self.broken, self.asked = name, list(changes), broken, []

    async def ask(self, request):
        self.asked.append(request)
        fields = {"content": "c", "fit": "f", "activity": "a", "feeling": "l", "change": 0}
        if len(self.asked) <= self.broken:
            fields = {}
        elif request.schema_name == "appraise":
            fields["change"] = self.changes.pop(0)
        else:
            fields = {
                "attitude": "neutral",
                "aim": "a",
                "tone": "t",
                "content": "c",
                "message": "And then?",
                "goodbye": False,
            }
        return ChatAnswer(
            text=json.dumps(fields),
            prompt_tokens=9,
            cached_tokens=0,
            completion_tokens=3,
            seconds=0.1,
            retries=0,
            model=self.name,
        )


def test_the_verdict_is_the_median_with_the_words_of_who_is_nearest():
    verdict = combine(
        [appraisal(5, "warm", merit=0.5), appraisal(-2, "cold"), appraisal(4, "mild", merit=0.4)]
    )
    assert (verdict.change, verdict.content) == (4, "mild")
    assert verdict.features == {
        "judge_spread": 7.0,
        "judge_disagreement": 1.0,
        "judge_1_change": 5,
        "judge_1_merit": 0.5,
        "judge_2_change": -2,
        "judge_3_change": 4,
        "judge_3_merit": 0.4,
    }
    assert json.loads(verdict.source) == ["warm", "cold", "mild"]
    # Of two the mean, and the first one's words; no change is neither a gain nor a loss.
    even = combine([appraisal(0, "flat"), appraisal(3, "glad")])
    assert (even.change, even.content, even.features["judge_disagreement"]) == (1.5, "flat", 0.0)
    assert combine([appraisal(2, "alone")]).change == 2


@given(
    changes=st.lists(st.floats(-10, 10).map(lambda value: round(value, 2)), min_size=1, max_size=7),
    data=st.data(),
)
def test_a_verdict_is_between_its_judges_and_knows_no_order(changes, data):
    verdict = combine([appraisal(change) for change in changes])
    assert min(changes) - 0.005 <= verdict.change <= max(changes) + 0.005
    again = combine([appraisal(change) for change in data.draw(st.permutations(changes))])
    for key in ("judge_spread", "judge_disagreement"):
        assert again.features[key] == verdict.features[key]
    assert again.change == verdict.change and verdict.features["judge_spread"] <= 20


def test_one_judge_more_extreme_than_the_rest_moves_nothing():
    calm = [appraisal(1), appraisal(2), appraisal(3)]
    assert (
        combine([*calm, appraisal(2), appraisal(10)]).change
        == combine([*calm, appraisal(2), appraisal(4)]).change
        == 2
    )


def test_rules_and_models_sit_on_one_panel():
    lexical = RuleJudge(appraiser=LexicalAppraiser(), rules=RULES)
    model = LlmSimulator(rules=RULES, backend=Model("m", 3, 3), settings=LlmUserConfig())
    panel = JudgePanel([lexical, model])
    first, again = asyncio.run(panel.appraise(request())), asyncio.run(panel.appraise(request()))
    alone = asyncio.run(lexical.appraise(request())).change
    assert first == again
    assert (first.features["judge_1_change"], first.features["judge_2_change"]) == (alone, 3)
    assert first.change == pytest.approx((alone + 3) / 2)
    with pytest.raises(ValueError, match="needs a judge"):
        JudgePanel([])


@pytest.mark.parametrize(
    "reply",
    ["", "\u200b\u2060", "\u3164", "\u0301", "\ufffc", "<think>I hear you.</think>", "[THINK]I hear you."],
)
def test_rules_and_models_take_the_same_replies_for_silence(reply):
    rules = RuleJudge(appraiser=LexicalAppraiser(), rules=RULES)
    model = LlmSimulator(rules=RULES, backend=Model("m"), settings=LlmUserConfig())
    assert asyncio.run(rules.appraise(request(reply))) == asyncio.run(model.appraise(request(reply)))


def test_rules_clip_to_the_presets_limit():
    class Shouts:
        def appraise(self, context):
            return appraisal(99.0)

    assert asyncio.run(RuleJudge(appraiser=Shouts(), rules=RULES).appraise(request())).change == 10.0


@pytest.mark.parametrize("error", [BoundaryError("endpoint gone"), BudgetError("no money left")])
def test_a_judge_that_fails_fails_the_appraisal_and_nobody_waits_for_the_others(error):
    slow = Says(1, wait_s=30)

    async def ask():
        with pytest.raises(type(error), match=str(error)):
            await JudgePanel([slow, Says(error=error)]).appraise(request())

    asyncio.run(asyncio.wait_for(ask(), timeout=5))
    assert slow.asked and not slow.finished


def test_all_judges_are_asked_at_once_each_under_its_own_name():
    judges = [Says(1, wait_s=0.05) for _ in range(3)]
    panel = JudgePanel(judges)

    async def ask():
        answer = asyncio.ensure_future(panel.appraise(request()))
        await asyncio.sleep(0.02)
        assert [judge.asked for judge in judges] == [["d"], ["d/judge_2"], ["d/judge_3"]]
        return await answer

    assert asyncio.run(ask()).change == 1
    assert panel.metrics() == {"asked": 3.0}


def test_replies_are_counted_once_and_answers_by_all():
    settings = LlmUserConfig(schema_retries=2)
    models = [Model("m", 0, broken=broken) for broken in (1, 2)]
    panel = JudgePanel([LlmSimulator(rules=RULES, backend=model, settings=settings) for model in models])
    asyncio.run(panel.appraise(request("<b>Hm.</b>")))
    counts = panel.metrics()
    assert (counts["replies_with_markup"], counts["schema_retries"]) == (1.0, 3.0)


def test_users_with_one_model_are_judged_under_several_seeds_and_answer_by_the_median():
    model = Model("m", 8, -1, 4)
    config = SimulatorConfig(
        backend=SimulatorBackend.vllm, judges=3, llm=LlmUserConfig(temperature=0.7, seed=5)
    )
    response = asyncio.run(llm_users(rules=RULES, backend=model, config=config).respond(request()))
    assert (response.appraisal.change, response.emotion, response.message) == (4, 44.0, "And then?")
    asked = [chat for chat in model.asked if chat.schema_name == "appraise"]
    assert len({chat.seed for chat in asked}) == len({chat.key for chat in asked}) == 3
    assert {chat.affinity for chat in asked} == {PERSONA.id}
    assert len({chat.messages for chat in asked}) == 1
    alone = llm_users(rules=RULES, backend=Model("m", 8), config=replace(config, judges=1))
    assert asyncio.run(alone.respond(request())).appraisal.change == 8


def test_further_models_judge_in_turn_and_the_users_own_model_speaks():
    own, b, c = Model("a", 1), Model("b", 2, 9), Model("c", 3)
    config = SimulatorConfig(
        backend=SimulatorBackend.vllm, judges=4, judge_models="b, c", llm=LlmUserConfig(temperature=0.5)
    )
    response = asyncio.run(
        llm_users(rules=RULES, backend=own, config=config, judge_backends=[b, c]).respond(request())
    )
    assert response.appraisal.change == pytest.approx(2.5)  # of 1, 2, 3 and 9
    assert [len(model.asked) for model in (own, b, c)] == [2, 2, 1]  # the reply is the user's own
    assert [json.loads(source)["model"] for source in json.loads(response.appraisal.source)] == [
        "a",
        "b",
        "c",
        "b",
    ]


def talk(name: str, *appraisals: Appraisal) -> Dialogue:
    turns = [builders.turn(index, appraisal=one) for index, one in enumerate(appraisals)]
    return builders.dialogue(turns, id=name)


def test_the_ledger_keeps_every_judges_number_and_metrics_say_how_far_they_are_apart(tmp_path):
    judged = [
        talk("a", combine([appraisal(4), appraisal(-2)]), combine([appraisal(1), appraisal(1)])),
        talk("b", combine([appraisal(1), appraisal(10)])),
    ]
    write_dialogues(tmp_path / "d.parquet", judged, iteration=1, phase="train", rewards={})
    assert read_dialogues(tmp_path / "d.parquet") == judged
    values = reduce_metrics(dialogue_metrics(judged, {}))
    assert (values["judges/spread"], values["judges/disagreement"]) == (
        pytest.approx((6 + 0 + 9) / 3),
        pytest.approx(1 / 3),
    )
    assert (values["judges/1_change"], values["judges/2_change"]) == (2.0, 3.0)
    alone = reduce_metrics(dialogue_metrics([talk("c", appraisal(4))], {}))
    assert not any(key.startswith("judges/") for key in alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judges": 1, "judge_models": "b"}, "simulator.judge_models=b: set simulator.judges above 1"),
        ({"judges": 2, "llm": LlmUserConfig(calls=LlmCalls.one)}, "simulator.llm.calls=one: use two"),
        (
            {"judges": 2},
            "simulator.llm.temperature=0.0: use a value above 0, or name 1 models in simulator.judge_models",
        ),
        (
            {"judges": 3, "judge_models": "b"},
            "simulator.llm.temperature=0.0: use a value above 0, or name 2 models",
        ),
    ],
)
def test_judges_that_could_not_differ_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SimulatorConfig(backend=SimulatorBackend.vllm, **options)


def test_two_models_may_judge_at_temperature_0():
    assert SimulatorConfig(backend=SimulatorBackend.vllm, judges=2, judge_models="b").further_judges == ("b",)


OPENAI = HttpChatConfig(endpoints="http://127.0.0.1:9/v1", model="big", api_key_env="")


@pytest.mark.parametrize(
    ("second", "simulator", "names"),
    [
        (SecondJudge.lexical, SimulatorConfig(), ["embedded", "lexical"]),
        (SecondJudge.none, SimulatorConfig(), ["embedded"]),
        (SecondJudge.openai, SimulatorConfig(openai=OPENAI), ["embedded", "openai: big"]),
        (
            SecondJudge.lexical,
            SimulatorConfig(backend=SimulatorBackend.openai, openai=OPENAI),
            ["openai: big", "lexical"],
        ),
        (
            SecondJudge.none,
            SimulatorConfig(backend=SimulatorBackend.openai, openai=OPENAI, judges=2, judge_models="small"),
            ["openai: big (median of 2 judges, with small)"],
        ),
    ],
)
def test_an_evaluation_names_its_judges(second, simulator, names):
    evaluation = EvaluationConfig(second_judge=second)
    assert judge_names(simulator, evaluation) == names

    async def build():
        async with second_judge(simulator, evaluation) as judge:
            return None if judge is None else set(judge.metrics())

    counts = asyncio.run(build())
    assert (counts is None) == (second is SecondJudge.none)
    assert (
        not counts
        if second is not SecondJudge.openai
        else {"schema_retries", "chat_cost", "chat_prompt_tokens"} < counts
    )


@pytest.mark.parametrize(
    ("evaluation", "simulator", "message"),
    [
        (
            {"second_judge": SecondJudge.embedded},
            SimulatorConfig(),
            "evaluation.second_judge=embedded: use lexical, openai or none",
        ),
        (
            {"second_judge": SecondJudge.openai},
            SimulatorConfig(),
            "evaluation.judge_model='': evaluation.second_judge=openai needs",
        ),
        (
            {"second_judge": SecondJudge.openai, "judge_model": "big"},
            SimulatorConfig(backend=SimulatorBackend.openai, openai=OPENAI),
            "evaluation.judge_model=big: use another model",
        ),
    ],
)
def test_a_second_judge_that_is_none_is_refused(evaluation, simulator, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(evaluation=EvaluationConfig(**evaluation), simulator=simulator)


def test_rules_judge_no_foreign_talk():
    chinese = replace(PERSONA, language="zh")
    for judge in (SecondJudge.openai, SecondJudge.none):
        check_second_judge(judge, [chinese])
    check_second_judge(SecondJudge.lexical, [PERSONA])
    with pytest.raises(DataError, match="second_judge=lexical reads English alone"):
        check_second_judge(SecondJudge.lexical, [PERSONA, chinese])
