"""Judges behind real sockets: a panel of two models at a faulty endpoint, and an evaluation's second
judge."""

import asyncio
from dataclasses import replace

from rlver_dist.chat_client.http import HttpChat
from rlver_dist.config.enums import Preset, SecondJudge, SimulatorBackend
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.config.simulator import HttpChatConfig, LlmUserConfig, SimulatorConfig
from rlver_dist.data.personas import load_split
from rlver_dist.dialogue import Appraisal, Dialogue, EndReason, Message, Role, Turn
from rlver_dist.errors import BoundaryError
from rlver_dist.evaluation.held_out import second_emotions
from rlver_dist.evaluation.second_judge import second_judge
from rlver_dist.simulator.emotion import move
from rlver_dist.simulator.llm.judges import llm_users
from rlver_dist.simulator.presets import PRESETS
from rlver_dist.simulator.protocol import UserRequest
from tests.integration.faulty_server import FaultyServer

RULES = PRESETS[Preset.sage]
PERSONA = load_split("bank", "train")[0]


def options(server: FaultyServer, model: str) -> HttpChatConfig:
    return HttpChatConfig(
        endpoints=server.url, model=model, api_key_env="", timeout_s=0.3, max_retries=1, max_backoff_s=0.02
    )


def request(number: int) -> UserRequest:
    messages = (
        Message(role=Role.USER, text="It all went wrong."),
        Message(role=Role.ASSISTANT, text=f"Tell me of day {number}."),
    )
    return UserRequest(
        dialogue_id=f"d{number}",
        turn_index=0,
        persona=PERSONA,
        messages=messages,
        emotion=40.0,
        seed=number,
        max_turns=8,
    )


def test_a_panel_at_a_faulty_endpoint_gives_a_whole_verdict_or_none():
    async def ask():
        async with FaultyServer(rate=0.3, seed=3) as server:
            models = [HttpChat(config=options(server, name)) for name in ("big", "small")]
            config = SimulatorConfig(
                backend=SimulatorBackend.vllm,
                judges=2,
                judge_models="small",
                llm=LlmUserConfig(schema_retries=1),
            )
            users = llm_users(rules=RULES, backend=models[0], config=config, judge_backends=models[1:])
            answers = await asyncio.gather(
                *(users.respond(request(number)) for number in range(40)), return_exceptions=True
            )
            for model in models:
                await model.close()
            return answers, {hit.body["model"] for hit in server.hits}

    answers, asked = asyncio.run(ask())
    assert asked == {"big", "small"}
    verdicts = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert all(isinstance(answer, BoundaryError) for answer in answers if answer not in verdicts)
    assert 0 < len(verdicts) < 40
    for verdict in verdicts:
        numbers = [verdict.appraisal.features[f"judge_{number}_change"] for number in (1, 2)]
        assert verdict.appraisal.change == sum(numbers) / 2
        assert verdict.emotion == move(40.0, verdict.appraisal.change, RULES.emotion)


def held_out(number: int) -> Dialogue:
    turn = Turn(
        index=0,
        prompt_ids=[1],
        reply_ids=[2],
        logprobs=[-1.0],
        reply=f"Tell me of day {number}.",
        thinking="",
        well_formed=True,
        truncated=False,
        emotion_before=40.0,
        emotion_after=45.0,
        user_message=None,
        policy_version=(0, 0),
        appraisal=Appraisal(content="", fit="", activity="", feeling="", change=5.0),
    )
    return Dialogue(
        id=f"e{number}",
        persona_id=PERSONA.id,
        group_id=PERSONA.id,
        seed=number,
        opening="It all went wrong.",
        start_emotion=40.0,
        turns=[turn],
        end_reason=EndReason.MAX_TURNS,
        final_emotion=45.0,
    )


def test_the_second_judge_of_an_evaluation_may_be_a_model_at_an_endpoint():
    async def judge(rate: float, schema_retries: int) -> list[float | None]:
        async with FaultyServer(rate=rate, seed=1) as server:
            users = SimulatorConfig(
                openai=options(server, "unused"), llm=LlmUserConfig(schema_retries=schema_retries)
            )
            evaluation = EvaluationConfig(second_judge=SecondJudge.openai, judge_model="other")
            async with second_judge(users, evaluation) as judge:
                assert judge is not None
                found = await second_emotions(
                    [held_out(number) for number in range(20)], [PERSONA], judge, RULES.emotion
                )
            assert {hit.body["model"] for hit in server.hits} == {"other"}
            counts = judge.metrics()
            assert counts["chat_calls"] - counts["chat_failures"] - counts["schema_failures"] >= sum(
                value is not None for value in found
            )
            assert counts["chat_completion_tokens"] > 0 and judge.metrics()["chat_calls"] == 0
            return found

    sound, again, faulty = (asyncio.run(judge(*rates)) for rates in ((0.0, 1), (0.0, 1), (0.5, 0)))
    assert sound == again and len(set(sound)) > 5
    assert all(30 <= emotion <= 50 for emotion in sound if emotion is not None) and None not in sound
    # What survives the faults is what a sound endpoint says, or an answer to a retry; the rest is a gap.
    assert 0 < faulty.count(None) < 20


def test_endpoints_are_asked_for_by_whoever_needs_them():
    assert not RunConfig().uses_endpoints
    users = SimulatorConfig(openai=HttpChatConfig(model="big"))
    second = RunConfig(simulator=users, evaluation=EvaluationConfig(second_judge=SecondJudge.openai))
    assert (
        second.uses_endpoints
        and not replace(second, evaluation=replace(second.evaluation, num_personas=0)).uses_endpoints
    )
