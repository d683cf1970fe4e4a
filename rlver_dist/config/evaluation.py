"""Options of the evaluation with held-out users."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.enums import SecondJudge
from rlver_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out dialogues before and after training."""

    num_personas: int = 100
    """Evaluation personas, the first so many of the file; 0 switches evaluation off."""
    max_turns: int = 8
    """Replies a dialogue."""
    temperature: float = 1.0
    """Sampling temperature; seeds are fixed, so that before and after differ by the weights alone."""
    bootstrap_samples: int = 10000
    """Resamples of the paired bootstrap interval."""
    second_judge: SecondJudge = SecondJudge.lexical
    """Who appraises the same dialogues once more, a judge that training never hears: `lexical` (rules on
    words), `embedded` (rules on embeddings; where a chat model speaks for the users), `openai` (a chat model
    at simulator.openai.endpoints, with simulator.llm's settings; simulator.openai's limits hold for it
    apart), or `none`."""
    judge_model: str = ""
    """Model of the second judge `openai`, as the endpoint knows it; empty takes simulator.openai.model."""

    def __post_init__(self) -> None:
        if self.num_personas < 0:
            raise ConfigError(f"evaluation.num_personas={self.num_personas}: use 0 or more")
        if self.max_turns < 1:
            raise ConfigError(f"evaluation.max_turns={self.max_turns}: use 1 or more")
        if not self.temperature > 0:
            raise ConfigError(f"evaluation.temperature={self.temperature}: use a number above 0")
        if self.bootstrap_samples < 100:
            raise ConfigError(f"evaluation.bootstrap_samples={self.bootstrap_samples}: use 100 or more")
