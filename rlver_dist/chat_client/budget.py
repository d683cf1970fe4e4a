"""What calls of a chat model use up, what that costs, and when a run has to stop."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.simulator import HttpChatConfig
from rlver_dist.errors import BudgetError

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 that count as one token where an endpoint does not say what it used; English text has about
four."""
MILLION = 1_000_000


@dataclass(kw_only=True, slots=True, frozen=True)
class Usage:
    """Tokens of one call.

    Attributes:
        prompt_tokens: all of the prompt.
        cached_tokens: those of the prompt that came from the endpoint's cache.
        completion_tokens: sampled tokens, hidden reasoning included.
        estimated: counted from bytes, since the endpoint did not say.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated: bool = False

    @property
    def total(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


def tokens_of(text: bytes) -> int:
    """Tokens of `text` where nothing better is known: its bytes / `BYTES_PER_TOKEN`, rounded up."""
    return -(-len(text) // BYTES_PER_TOKEN)


@dataclass(kw_only=True, slots=True, frozen=True)
class Prices:
    """Money per million tokens, in any one currency. A cached price of 0 stands for the price of other prompt
    tokens."""

    prompt: float = 0.0
    cached: float = 0.0
    completion: float = 0.0

    @classmethod
    def of(cls, config: HttpChatConfig) -> Prices:
        """Those that `config` names."""
        return cls(
            prompt=config.price_per_million_prompt,
            cached=config.price_per_million_cached,
            completion=config.price_per_million_completion,
        )

    def cost(self, *, prompt_tokens: float, cached_tokens: float, completion_tokens: float) -> float:
        """Money for these tokens; `cached_tokens` are part of `prompt_tokens`."""
        # Endpoints that cache mostly charge less for it; without a price of its own it costs as the rest.
        fresh = (prompt_tokens - cached_tokens) * self.prompt
        return (
            fresh + cached_tokens * (self.cached or self.prompt) + completion_tokens * self.completion
        ) / MILLION


class Budget:
    """Tokens and money used so far, against their limits.

    It is asked before a call and told after it, so calls that are in flight when a limit is reached can
    exceed it.
    """

    def __init__(self, config: HttpChatConfig) -> None:
        self._config = config
        self._prices = Prices.of(config)
        self.tokens = 0
        self.cost = 0.0

    def charge(self, usage: Usage) -> float:
        """Add a call's usage; returns what it cost."""
        cost = self._prices.cost(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )
        self.tokens += usage.total
        self.cost += cost
        return cost

    def check(self) -> None:
        """Raise `BudgetError` if a limit is reached."""
        config = self._config
        if 0 < config.max_tokens_total <= self.tokens:
            raise BudgetError(
                f"simulator.openai.max_tokens_total={config.max_tokens_total}: used up ({self.tokens} "
                f"tokens); raise it and resume the run"
            )
        if 0 < config.max_cost <= self.cost:
            raise BudgetError(
                f"simulator.openai.max_cost={config.max_cost:g}: used up ({self.cost:.4f}); raise it and "
                f"resume the run"
            )
