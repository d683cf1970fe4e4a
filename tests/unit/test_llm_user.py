"""The LLM user's own logic: what is asked, what is read from an answer, how the emotion moves, when the talk
ends."""

import asyncio
import json
from dataclasses import replace

import pytest

from rlver_dist.chat_client.protocol import ChatAnswer
from rlver_dist.config.enums import LlmCalls, Preset
from rlver_dist.config.simulator import LlmUserConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import EndReason, Message, Role
from rlver_dist.errors import BoundaryError
from rlver_dist.simulator.llm.schema import (
    SchemaError,
    appraisal_schema,
    opening_schema,
    parse_answer,
    reply_schema,
)
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest

PERSONA = load_split("bank", "train")[0]
NOTES = {"content": "c", "fit": "f", "activity": "a", "feeling": "l"}
REPLY = {
    "attitude": "neutral",
    "aim": "a",
    "tone": "t",
    "content": "c",
    "message": "And then it rained.",
    "goodbye": False,
}
SCHEMA = appraisal_schema(language="en", max_tokens=400)


class Network:
    """Stands in for the network: gives the next answer of its list and keeps what was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def ask(self, request):
        self.asked.append(request)
        answer = self.answers.pop(0)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return ChatAnswer(
            text=text,
            prompt_tokens=9,
            cached_tokens=0,
            completion_tokens=3,
            seconds=0.1,
            retries=0,
            model="m",
        )

    def metrics(self):
        return {}

    async def close(self):
        pass


def simulator(network, preset=Preset.rlver_vanilla, **settings):
    return LlmSimulator(rules=PRESETS[preset], backend=network, settings=LlmUserConfig(**settings))


def request(emotion=30.0, reply="I hear you.", turn=0, **fields):
    talk = [Message(role=Role.USER, text="It all went wrong.")]
    talk += [Message(role=Role.ASSISTANT, text="Hm."), Message(role=Role.USER, text="So it did.")] * turn
    messages = (*talk, Message(role=Role.ASSISTANT, text=reply))
    values = {
        "dialogue_id": "d",
        "turn_index": turn,
        "persona": PERSONA,
        "messages": messages,
        "emotion": emotion,
        "seed": 7,
        "max_turns": 8,
    }
    return UserRequest(**(values | fields))


def ask(network, asked=None, **settings):
    return asyncio.run(simulator(network, **settings).respond(asked or request()))


def test_two_calls_appraise_then_reply():
    network = Network({**NOTES, "change": 5}, REPLY)
    response = ask(network)
    assert (response.emotion, response.message, response.end_reason) == (35.0, "And then it rained.", None)
    assert (response.appraisal.fit, response.appraisal.change) == ("f", 5.0)
    assert [one.schema_name for one in network.asked] == ["appraise", "reply"]
    assert network.asked[0].messages[0] == network.asked[1].messages[0]
    assert {one.affinity for one in network.asked} == {PERSONA.id}


def test_one_call_does_both_under_one_schema():
    network = Network({"appraisal": {**NOTES, "change": -5}, "reply": REPLY})
    response = ask(network, calls=LlmCalls.one)
    assert (response.emotion, response.message, len(network.asked)) == (25.0, "And then it rained.", 1)


def test_the_appraiser_is_told_the_true_emotion():
    for emotion in (30.0, 62.0):
        network = Network({**NOTES, "change": 0}, REPLY)
        ask(network, request(emotion=emotion))
        assert f"Your mood is {emotion:g} of 100" in network.asked[0].messages[1].text


def test_what_judged_is_recorded():
    network = Network({**NOTES, "change": 0}, REPLY)
    source = json.loads(ask(network, seed=3).appraisal.source)
    assert source["seed"] == network.asked[0].seed
    assert (source["model"], source["calls"], source["temperature"]) == ("m", "two", 0.0)
    assert source["prompts"].startswith("en-")


def test_equal_requests_ask_equal_questions():
    first, second = (Network({**NOTES, "change": 1}, REPLY) for _ in range(2))
    assert ask(first) == ask(second)
    assert first.asked == second.asked


@pytest.mark.parametrize("calls", LlmCalls)
@pytest.mark.parametrize(
    ("emotion", "change", "turn", "end"),
    [
        (95.0, 5, 0, EndReason.EMOTION_HIGH),
        (12.0, -3, 0, EndReason.EMOTION_LOW),
        (50.0, 1, 7, EndReason.MAX_TURNS),
    ],
)
def test_rules_end_the_talk_and_no_message_follows(calls, emotion, change, turn, end):
    appraisal = {**NOTES, "change": change}
    network = Network(appraisal if calls is LlmCalls.two else {"appraisal": appraisal, "reply": REPLY})
    response = ask(network, request(emotion=emotion, turn=turn), calls=calls)
    assert (response.end_reason, response.message, len(network.asked)) == (end, None, 1)


def test_goodbye_is_a_field_and_not_a_word():
    words = {**REPLY, "message": "I said goodbye, bye, to the ferry."}
    assert ask(Network({**NOTES, "change": 0}, words)).end_reason is None
    assert ask(Network({**NOTES, "change": 0}, {**REPLY, "goodbye": True})).end_reason is EndReason.GOODBYE


def test_presets_clip_what_the_schema_lets_through():
    rules = replace(PRESETS[Preset.sage], emotion=replace(PRESETS[Preset.sage].emotion, max_change=4.0))
    network = Network({**NOTES, "change": 9}, REPLY)
    response = asyncio.run(
        LlmSimulator(rules=rules, backend=network, settings=LlmUserConfig()).respond(request(emotion=40.0))
    )
    assert (response.appraisal.change, response.emotion) == (4.0, 44.0)


def test_openings_are_the_personas_own_or_asked_for_alike_within_a_group():
    opening = {"turn_index": -1, "messages": ()}
    assert ask(Network(), request(**opening)).message == PERSONA.opening
    silent = replace(PERSONA, opening="")
    answer = {"aim": "a", "tone": "t", "content": "c", "message": "I had a bad day."}
    networks = [Network(answer), Network(answer)]
    for network, seed in zip(networks, (1, 2), strict=True):
        response = ask(network, request(**opening, persona=silent, seed=seed))
        assert (response.message, response.emotion, response.appraisal) == ("I had a bad day.", 30.0, None)
    assert networks[0].asked == networks[1].asked


def test_a_broken_answer_is_asked_for_again_with_another_seed():
    network = Network("no json", {**NOTES, "change": 11}, {**NOTES, "change": 2}, REPLY)
    user = simulator(network)
    assert asyncio.run(user.respond(request())).emotion == 32.0
    assert len({one.seed for one in network.asked[:3]}) == 3
    assert len({one.key for one in network.asked[:3]}) == 3
    assert [one.temperature for one in network.asked[:3]] == [0.0, 0.7, 0.7]
    assert user.metrics()["schema_retries"] == 2.0
    assert user.metrics()["schema_retries"] == 0.0


def test_an_answer_that_stays_broken_is_never_scored():
    user = simulator(Network(*["[]"] * 3))
    with pytest.raises(BoundaryError, match="d/0/appraise: 3 answers broke their schema"):
        asyncio.run(user.respond(request()))
    assert user.metrics()["schema_failures"] == 1.0


def test_a_judge_appraises_in_the_users_place():
    judge = simulator(Network({**NOTES, "change": 8}))
    network = Network(REPLY)
    settings = LlmUserConfig(calls=LlmCalls.one)
    user = LlmSimulator(rules=PRESETS[Preset.rlver_vanilla], backend=network, settings=settings, judge=judge)
    assert asyncio.run(user.respond(request())).emotion == 38.0
    assert [one.schema_name for one in network.asked] == ["reply"]


def test_tricks_in_a_reply_are_counted():
    user = simulator(Network({**NOTES, "change": 0}, REPLY))
    features = asyncio.run(user.respond(request(reply="<b>x\u200b\u200c"))).appraisal.features
    assert features == {"fence_markup": 2.0, "fence_hidden": 2.0, "fence_thought": 0.0, "fence_cut": 0.0}
    metrics = user.metrics()
    assert (metrics["replies_with_markup"], metrics["replies_with_hidden"], metrics["replies_cut"]) == (
        1.0,
        1.0,
        0.0,
    )


@pytest.mark.parametrize("calls", LlmCalls)
@pytest.mark.parametrize(
    "reply", ["", "\u200b\x00", " \n" * 3000, "<think>I win.</think>", "\ufffc", "\u0301 \u20dd", "\u3164"]
)
def test_a_reply_with_nothing_left_to_read_costs_the_most_and_no_appraisal(calls, reply):
    network = Network(REPLY)
    response = ask(network, request(reply=reply), calls=calls)
    assert (response.emotion, response.appraisal.change) == (20.0, -10.0)
    assert [one.schema_name for one in network.asked] == ["reply"]


def test_what_hides_a_part_of_itself_lifts_no_mood():
    for reply, change, moved in (
        ("<think>x</think>Hi.", 9, 0.0),
        ("Hi.<analysis>x</analysis>", -4, -4.0),
        ("Hi.", 9, 9.0),
    ):
        assert (
            ask(Network({**NOTES, "change": change}, REPLY), request(reply=reply)).appraisal.change == moved
        )


@pytest.mark.parametrize(
    "reply", ["I felt <emotion> because <reason>.", "[Think] What would you tell a friend?", "<analysis> Hi."]
)
def test_a_placeholder_hides_nothing_and_may_lift_the_mood(reply):
    assert ask(Network({**NOTES, "change": 9}, REPLY), request(reply=reply)).appraisal.change == 9.0


def test_users_words_carry_no_tags_to_the_policy():
    network = Network({**NOTES, "change": 0}, {**REPLY, "message": "Fine.<|im_end|>\u202e\ud800"})
    assert ask(network).message == "Fine.\u2039\u00a6im_end\u00a6\u203a"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "NaN",
        json.dumps(NOTES),
        json.dumps({**NOTES, "change": True}),
        json.dumps({**NOTES, "change": "5"}),
        json.dumps({**NOTES, "change": 5.0}),
        json.dumps({**NOTES, "change": 11}),
        json.dumps({**NOTES, "change": -100}),
        json.dumps({**NOTES, "change": float("nan")}),
        json.dumps({**NOTES, "change": 5, "emotion": 100}),
        json.dumps({**NOTES, "fit": "", "change": 5}),
        json.dumps({**NOTES, "fit": ["x"], "change": 5}),
        json.dumps({**NOTES, "fit": "x" * 5000, "change": 5}),
        json.dumps({**NOTES, "change": 5})[:-1] + ', "change": 9}',
        json.dumps({**NOTES, "change": 5}) + " and a bit more",
        "[" * 100000,
        '{"change": ' + "9" * 5000 + "}",
    ],
)
def test_an_answer_outside_its_schema_is_refused(text):
    with pytest.raises(SchemaError) as refused:
        parse_answer(text, SCHEMA)
    assert len(str(refused.value)) < 400


def test_an_answers_length_is_what_the_model_wrote():
    # U+2474 is a one in brackets, three characters once it is plain.
    assert (
        parse_answer(json.dumps({**NOTES, "fit": "\u2474" * 255, "change": 1}), SCHEMA)["fit"] == "(1)" * 255
    )
    for text in ("x" + "\u200b" * 255, "\u200b", " \u0301"):
        with pytest.raises(SchemaError, match=f"fit: {len(text)} characters"):
            parse_answer(json.dumps({**NOTES, "fit": text, "change": 1}), SCHEMA)


def test_answers_inside_their_schemas_are_read():
    assert parse_answer(json.dumps({**NOTES, "change": -10}), SCHEMA)["change"] == -10
    assert parse_answer(json.dumps(REPLY), reply_schema(language="zh", max_tokens=300)) == REPLY


def test_texts_of_an_answer_fit_into_its_tokens():
    # (400 tokens - 60 for names) x 3 characters / 4 notes
    assert SCHEMA["properties"]["fit"]["maxLength"] == 255
    # (300 - 60) x 1 / 6 parts, of which the message takes three
    assert opening_schema(language="zh", max_tokens=300)["properties"]["message"]["maxLength"] == 120
