"""How long a run will take, by stage, from rates that it measured itself in its first minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.evaluation import EvaluationConfig
from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.dialogue import Turn
from rlver_dist.tracking.progress import duration

FIRST_WORD_S = 60.0
"""Seconds of sampling after which the first estimate is given."""
TRAINED = 3.5
"""Time of a forward and backward pass over that of a forward pass; a backward pass multiplies twice where a
forward pass does once."""
OPTIONS = {
    "evaluation": "evaluation.num_personas and evaluation.max_turns",
    "warm-up": "warm_up.dialogues",
    "iterations": "num_iterations, rollout.dialogues_per_iteration and rollout.max_turns",
}
"""What shortens each kind of stage."""


@dataclass(slots=True)
class _Mean:
    """A mean as it grows."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def value(self, default: float) -> float:
        return self.total / self.count if self.count else default


class Forecast:
    """Hears each reply as it is sampled; after a minute of that it can say how long the rest takes."""

    def __init__(
        self,
        *,
        rollout: RolloutConfig,
        algorithm: AlgorithmConfig,
        evaluation: EvaluationConfig,
        warm_up: WarmUpConfig,
    ) -> None:
        self._rollout = rollout
        self._algorithm = algorithm
        self._evaluation = evaluation
        self._warm_up = warm_up
        self._sampling = 0
        self._sampling_since = 0.0
        self._sampled_s = 0.0
        # Tokens: of a first prompt, by which a prompt grows a turn, of a reply without its thought, of a
        # thought.
        self._opening = _Mean()
        self._growth = _Mean()
        self._reply = _Mean()
        self._thought = _Mean()
        self.score_rate = 0.0
        """Tokens a second of the learner's forward pass; 0 where it was not measured, and then no estimate is
        given."""
        self.evaluation_s: float | None = None
        """Seconds of the latest evaluation, controls included."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Dialogues are held inside the block; blocks may overlap, and seconds that several share count
        once."""
        # A count and no flag: control and warm-up replies may be sampled at once.
        if self._sampling == 0:
            self._sampling_since = time.monotonic()
        self._sampling += 1
        try:
            yield
        finally:
            if self._sampling == 1:
                self._sampled_s = self._sampling_s
            self._sampling -= 1

    def hear(self, turn: Turn) -> None:
        """Count one sampled reply."""
        self._reply.add(len(turn.reply_ids) - turn.thinking_tokens)
        if turn.thinking_tokens:
            self._thought.add(turn.thinking_tokens)
        if turn.index == 0:
            self._opening.add(len(turn.prompt_ids))
        else:
            # The first prompt of this very dialogue is not known here; the mean stands for it.
            self._growth.add((len(turn.prompt_ids) - self._opening.value(0.0)) / turn.index)

    @property
    def ready(self) -> bool:
        """Whether enough has been measured."""
        return self._reply.count > 0 and self.score_rate > 0 and self._sampling_s >= FIRST_WORD_S

    def text(self, *, warms_up: bool, evaluations: int, iterations: int) -> str:
        """One line: the time of the whole rest of the run, of each kind of stage, and the options that
        shorten the longest.

        Args:
            warms_up: the format warm-up is still to come.
            evaluations: evaluations that are still to come, the present one included.
            iterations: iterations that are still to come.
        """
        seconds = {
            "evaluation": evaluations * self._evaluation_s(),
            "warm-up": self._warm_up_s() if warms_up else 0.0,
            "iterations": iterations * self._iteration_s(),
        }
        each = {
            "evaluation": f"{evaluations} x {duration(self._evaluation_s())}",
            "warm-up": duration(seconds["warm-up"]),
            "iterations": f"{iterations} x {duration(self._iteration_s())}",
        }
        told = ", ".join(f"{name} {each[name]}" for name, value in seconds.items() if value)
        # Options of the other stages would shorten little.
        longest = max(seconds, key=lambda name: seconds[name])
        whole = duration(sum(seconds.values()))
        return (
            f"by the rates of the first minute the run takes about {whole} more: {told}; {OPTIONS[longest]} "
            f"shorten it most"
        )

    def left_s(self, *, iterations: int, iteration_s: float) -> float:
        """Seconds until the end of a run with so many iterations to go, each as long as `iteration_s`; the
        evaluation included."""
        return iterations * iteration_s + (self.evaluation_s or 0.0)

    @property
    def _sampling_s(self) -> float:
        """Seconds in which dialogues were held so far."""
        return self._sampled_s + (time.monotonic() - self._sampling_since if self._sampling else 0.0)

    @property
    def _token_rate(self) -> float:
        return (self._reply.total + self._thought.total) / self._sampling_s

    def _sampled(self, think: bool) -> float:
        """Tokens of a reply, its thought included."""
        # Before the first thought is sampled, the longest that the warm-up teaches stands for it.
        thought = self._thought.value(
            min(self._warm_up.max_thought_tokens, self._rollout.max_thinking_tokens)
        )
        return self._reply.value(0.0) + (thought if think else 0.0)

    def _tokens(self, turns: int, think: bool) -> float:
        """Tokens of one dialogue as a learner computes them: the history once, and with thinking each reply
        beside it once more."""
        # A turn adds a reply and a user's message; before one was measured, both are taken for equally long.
        growth = self._growth.value(2 * self._reply.value(0.0))
        return self._opening.value(0.0) + turns * (growth + (self._sampled(think) if think else 0.0))

    def _evaluation_s(self) -> float:
        evaluation = self._evaluation
        sampled = evaluation.max_turns * self._sampled(self._rollout.think)
        # The controls score what the user heard, which holds no thoughts.
        scored = self._tokens(evaluation.max_turns, think=False)
        return evaluation.num_personas * (sampled / self._token_rate + scored / self.score_rate)

    def _warm_up_s(self) -> float:
        warm_up = self._warm_up
        sampled = warm_up.max_turns * (self._sampled(think=False) + warm_up.max_thought_tokens)
        # The teacher reads each dialogue once a pass, too.
        learned = warm_up.epochs * (TRAINED + 1) * self._tokens(warm_up.max_turns, think=True)
        return warm_up.dialogues * (sampled / self._token_rate + learned / self.score_rate)

    def _iteration_s(self) -> float:
        rollout = self._rollout
        algorithm = self._algorithm
        sampled = rollout.max_turns * self._sampled(rollout.think)
        # Forward passes beside the training one: old log-probs of all steps but the first, and the
        # reference's.
        beside = 1 - 1 / algorithm.updates_per_iteration + (algorithm.kl_coef > 0)
        learned = (TRAINED + beside) * self._tokens(rollout.max_turns, rollout.think)
        return rollout.dialogues_per_iteration * (sampled / self._token_rate + learned / self.score_rate)
