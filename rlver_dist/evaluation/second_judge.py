"""The second judge of held-out dialogues: a further opinion on what was said, by one that training never
hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from rlver_dist.chat_client.http import HttpChat
from rlver_dist.chat_client.protocol import ChatBackend
from rlver_dist.config.enums import SecondJudge, SimulatorBackend
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.dialogue import Appraisal
from rlver_dist.simulator.llm.judges import RuleJudge
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import resolve_rules
from rlver_dist.simulator.protocol import Judge, UserRequest
from rlver_dist.simulator.rules.appraisal import EmbeddedAppraiser
from rlver_dist.simulator.rules.lexical import LexicalAppraiser


@asynccontextmanager
async def second_judge(
    simulator: SimulatorConfig, evaluation: EvaluationConfig
) -> AsyncIterator[Judge | None]:
    """The judge of `evaluation.second_judge`, under the evaluation users' rules; its connections stay open
    until the block ends.

    Args:
        simulator: the users of training; settings and limits of a chat model hold for the judge, too.
        evaluation: who judges.

    Yields:
        The judge; None where there is none.

    Raises:
        ConfigError: the environment lacks the endpoints' key.
    """
    rules = resolve_rules(simulator.for_evaluation())
    # Without an evaluation a judge would load a model, or ask for a key, for nothing.
    match evaluation.second_judge if evaluation.num_personas else SecondJudge.none:
        case SecondJudge.lexical:
            yield RuleJudge(appraiser=LexicalAppraiser(), rules=rules)
        case SecondJudge.embedded:
            yield RuleJudge(appraiser=EmbeddedAppraiser(), rules=rules)
        case SecondJudge.openai:
            # A backend of its own: tokens, cost and rate are limited apart from those of the users.
            backend = HttpChat(config=replace(simulator.openai, model=_model(simulator, evaluation)))
            try:
                yield _Charged(
                    judge=LlmSimulator(rules=rules, backend=backend, settings=simulator.llm), backend=backend
                )
            finally:
                await backend.close()
        case SecondJudge.none:
            yield None


class _Charged:
    """A judge whose metrics tell what its calls used up, too."""

    def __init__(self, *, judge: Judge, backend: ChatBackend) -> None:
        self._judge = judge
        self._backend = backend

    async def appraise(self, request: UserRequest) -> Appraisal:
        """The judge's own appraisal."""
        return await self._judge.appraise(request)

    def metrics(self) -> dict[str, float]:
        """The judge's counts, and those of its calls as `chat_<name>`."""
        return self._judge.metrics() | {
            f"chat_{name}": value for name, value in self._backend.metrics().items()
        }


def judge_names(simulator: SimulatorConfig, evaluation: EvaluationConfig) -> list[str]:
    """Who gives the emotions of an evaluation: the users' judge, and the second one where there is one."""
    second = evaluation.second_judge
    model = {
        SimulatorBackend.vllm: simulator.engine.model,
        SimulatorBackend.openai: simulator.openai.model,
    }.get(simulator.backend)
    further = ", ".join(simulator.further_judges)
    panel = (
        f" (median of {simulator.judges} judges{f', with {further}' if further else ''})"
        if simulator.judges > 1
        else ""
    )
    first = (f"{simulator.backend.value}: {model}" if model else simulator.backend.value) + panel
    match second:
        case SecondJudge.none:
            return [first]
        case SecondJudge.openai:
            return [first, f"{second.value}: {_model(simulator, evaluation)}"]
        case _:
            return [first, second.value]


def _model(simulator: SimulatorConfig, evaluation: EvaluationConfig) -> str:
    return evaluation.judge_model or simulator.openai.model
