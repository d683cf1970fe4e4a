"""More than one judge of the same reply: the median of their changes is the verdict, and how far they are
apart is recorded.

A judge is anything with `async appraise(request) -> Appraisal`: an LLM user as it is, or rules (`RuleJudge`).
Judges see the same talk and not each other. Where one of them fails, the appraisal fails: a median over those
that happened to answer would depend on chance, and a repeated request has to get an equal answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from statistics import median

from rlver_dist.chat_client.protocol import ChatBackend
from rlver_dist.concurrency import all_or_none
from rlver_dist.config.simulator import SimulatorConfig
from rlver_dist.dialogue import Appraisal
from rlver_dist.simulator.appraiser import Appraiser, appraise_request
from rlver_dist.simulator.llm.user import LlmSimulator
from rlver_dist.simulator.presets import DifficultyRules
from rlver_dist.simulator.protocol import Judge, UserRequest

SPREAD, DISAGREEMENT = "judge_spread", "judge_disagreement"
JUDGE_CHANGE = re.compile(r"judge_\d+_change")
"""Names of features that `combine` writes."""


class RuleJudge:
    """An `Appraiser` as a judge; it computes in a thread, one reply at a time."""

    def __init__(self, *, appraiser: Appraiser, rules: DifficultyRules) -> None:
        self._appraiser = appraiser
        self._rules = rules
        # A lock of threads, not of tasks: a thread goes on where its task has been cancelled.
        self._lock = threading.Lock()

    async def appraise(self, request: UserRequest) -> Appraisal:
        """Appraise the last message of `request` in a thread, so that the event loop stays free."""
        return await asyncio.to_thread(self._appraise, request)

    def metrics(self) -> dict[str, float]:
        """Rules count nothing."""
        return {}

    def _appraise(self, request: UserRequest) -> Appraisal:
        with self._lock:
            return appraise_request(self._appraiser, request, self._rules)


class JudgePanel:
    """Several judges as one."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        """
        Raises:
            ValueError: there is no judge.
        """
        if not judges:
            raise ValueError("a panel needs a judge")
        self._judges = tuple(judges)

    async def appraise(self, request: UserRequest) -> Appraisal:
        """Ask all judges at once and combine what they say (`combine`). The first failure is the panel's
        failure, and the calls of the other judges are cancelled."""
        asked = []
        for number, judge in enumerate(self._judges, start=1):
            own_request = request
            if number > 1:
                # A chat call's key is made of the dialogue's id, and equal keys promise equal content. The
                # first judge keeps the id: it is the model that also speaks for the user.
                own_request = replace(request, dialogue_id=f"{request.dialogue_id}/judge_{number}")
            asked.append(judge.appraise(own_request))
        return combine(await all_or_none(asked))

    def metrics(self) -> dict[str, float]:
        """Counts since the last call. Counts of replies (`replies_...`) are the first judge's, since all
        judges read the same replies; counts of answers are added up."""
        total: Counter[str] = Counter(self._judges[0].metrics())
        for judge in self._judges[1:]:
            total.update(
                {name: count for name, count in judge.metrics().items() if not name.startswith("replies_")}
            )
        return dict(total)


def combine(appraisals: Sequence[Appraisal]) -> Appraisal:
    """The verdict of one or more judges.

    The change is the median (with an even number the mean of the middle two, two decimals); the words are
    those of the first judge that is nearest to it. `features` holds, for judge i from 1 on,
    `judge_<i>_change` and its own features as `judge_<i>_<name>`; `judge_spread`, the largest change less the
    smallest, in points; and `judge_disagreement`, 1 where one judge saw a gain and another a loss, else 0.
    `source` is the JSON list of theirs.
    """
    changes = [appraisal.change for appraisal in appraisals]
    # The median, not the mean: one judge that a reply has fooled then moves the verdict at most to the next
    # judge's change.
    verdict = round(median(changes), 2)
    speaker = min(appraisals, key=lambda appraisal: abs(appraisal.change - verdict))
    features = {
        SPREAD: round(max(changes) - min(changes), 2),
        DISAGREEMENT: float(min(changes) < 0 < max(changes)),
    }
    for number, appraisal in enumerate(appraisals, start=1):
        features[f"judge_{number}_change"] = appraisal.change
        features |= {f"judge_{number}_{name}": value for name, value in appraisal.features.items()}
    return replace(
        speaker,
        change=verdict,
        features=features,
        source=json.dumps([appraisal.source for appraisal in appraisals]),
    )


def llm_users(
    *,
    rules: DifficultyRules,
    backend: ChatBackend,
    config: SimulatorConfig,
    judge_backends: Sequence[ChatBackend] = (),
) -> LlmSimulator:
    """The LLM users of a configuration, with `config.judges` appraisals of each reply.

    Args:
        rules: of emotion and difficulty.
        backend: speaks for the users, and is the first judge.
        config: number of judges, and the users' settings; judge i from 1 on has the settings' seed + i - 1.
        judge_backends: of `config.judge_models`, for the judges after the first, in turn; none leaves them to
            `backend`.
    """
    if config.judges == 1:
        return LlmSimulator(rules=rules, backend=backend, settings=config.llm)
    others = islice(cycle(judge_backends or [backend]), config.judges - 1)
    panel = JudgePanel(
        [
            LlmSimulator(
                rules=rules, backend=one, settings=replace(config.llm, seed=config.llm.seed + number)
            )
            for number, one in enumerate([backend, *others])
        ]
    )
    return LlmSimulator(rules=rules, backend=backend, settings=config.llm, judge=panel)
