"""What a driver works with, as plain coroutines and without Ray: the interface between cluster and trainer.

`cluster/build.py` makes the components of a run out of actors; a test makes them out of small objects. What
each one consumes, produces and waits for stands in `trainer/driver.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlver_dist.config.learner import WarmUpConfig
from rlver_dist.experience.samples import ImitationSample, TurnSample
from rlver_dist.rollout.collector import GenerateFn, RespondFn
from rlver_dist.rollout.renderer import Renderer
from rlver_dist.simulator.protocol import Judge
from rlver_dist.tracking.console import Console
from rlver_dist.tracking.forecast import Forecast
from rlver_dist.tracking.jsonl import Tracker
from rlver_dist.tracking.metrics import Metric


class Learner(Protocol):
    """All ranks of a learner, addressed as one.

    Arguments and results that belong to samples hold one `[n]` tensor a sample, over its n trained tokens.
    """

    async def save(self, directory: Path) -> None:
        """Write everything that training needs to go on."""

    async def load(self, directory: Path) -> None:
        """Go on from what `save` wrote."""


class Policy(Learner, Protocol):
    """The policy learner."""

    async def update(
        self, samples: list[TurnSample], advantages: list[Tensor], kl_coef: float
    ) -> list[Metric]:
        """Optimizer steps on one iteration's samples."""

    async def imitate(self, samples: list[ImitationSample], config: WarmUpConfig, seed: int) -> list[Metric]:
        """Supervised warm-up; training starts anew from the result."""

    async def kl_tokens(self, samples: list[TurnSample]) -> list[Tensor]:
        """KL to the reference at each trained token, nats."""

    async def score_rate(self) -> float:
        """Tokens a second of a forward pass, measured now."""

    async def progress(self) -> tuple[int, int]:
        """What the call at hand has computed, and all that it will: tokens, replies of `imitate`; 0 and 0
        where there is none."""

    async def base_nll(self, samples: list[TurnSample]) -> tuple[float, int]:
        """Negative log-likelihood of all trained tokens under the base model at temperature 1 in nats, and
        their number."""

    async def export(self, directory: Path) -> None:
        """Write the policy as a Hugging Face folder."""


class Critic(Learner, Protocol):
    """The critic learner."""

    async def values(self, samples: list[TurnSample]) -> list[Tensor]:
        """Expected reward before each trained token."""

    async def update(
        self, samples: list[TurnSample], values: list[Tensor], returns: list[Tensor]
    ) -> list[Metric]:
        """Optimizer steps towards `returns`; `values` are those that `values` gave."""


@dataclass(kw_only=True, slots=True)
class Components:
    """A run's components.

    Attributes:
        generate: samples one reply with the newest weights.
        users: appraise a training reply and answer it.
        evaluation_users: the same for held-out dialogues, under SAGE's rules.
        second_judge: appraises held-out dialogues once more; None where there is none.
        policy: the policy learner.
        critic: the critic learner; None where the algorithm has none.
        sync: brings every engine to the policy's weights, labelled with a version.
        service_metrics: what users and engines counted since the last call.
        tokenizer: the policy's.
        renderer: writes the policy's prompts and reads its replies.
        plain_renderer: the same, and never asks for thinking.
        trackers: take each iteration's metrics.
        console: shows progress and results.
        forecast: hears each reply, and says how long the run will take.
        ranks: ranks of each learner, as checkpoints note them (`Layout.ranks`).
    """

    generate: GenerateFn
    users: RespondFn
    evaluation_users: RespondFn
    second_judge: Judge | None
    policy: Policy
    critic: Critic | None
    sync: Callable[[int], Awaitable[list[Metric]]]
    service_metrics: Callable[[], Awaitable[list[Metric]]]
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    plain_renderer: Renderer
    trackers: Sequence[Tracker]
    console: Console
    forecast: Forecast
    ranks: dict[str, str]

    @property
    def learners(self) -> list[Learner]:
        """The learners that there are, which save and load alike."""
        return [self.policy, *([self.critic] if self.critic else [])]
