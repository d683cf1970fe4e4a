"""What happened to calls over HTTP since the metrics were last read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rlver_dist.chat_client.budget import Usage
from rlver_dist.chat_client.metrics import ChatWindow
from rlver_dist.chat_client.wire import Fault

HTTP_COUNTS = ("estimated_usage", "cost", "lost_attempts", "lost_tokens", "lost_cost")


@dataclass(kw_only=True, slots=True)
class HttpWindow(ChatWindow):
    """Counts of one window. Tokens are those of every attempt that said what it used, useless answers
    included.

    Attributes:
        faults: attempts that failed, by what went wrong.
        estimated_usage: answers whose tokens were estimated, since the endpoint did not give them.
        cost: of the window's tokens at the configured prices.
        lost_attempts: attempts that an endpoint may charge for and that never said what they used: cut off,
            late or cancelled.
        lost_tokens: estimate of what they used, with all that they might have sampled; in none of the counts
            above.
        lost_cost: the same in money.
    """

    faults: Counter[Fault] = field(default_factory=Counter)
    estimated_usage: int = 0
    cost: float = 0.0
    lost_attempts: int = 0
    lost_tokens: int = 0
    lost_cost: float = 0.0

    def answered(self, seconds: float) -> None:
        """Count an answered call; retries and tokens are counted attempt by attempt."""
        self.calls += 1
        self.latencies_s.append(seconds)

    def add_usage(self, usage: Usage, cost: float) -> None:
        """Count an attempt that said what it used."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.estimated_usage += usage.estimated
        self.cost += cost

    def add_lost(self, most: Usage, cost: float) -> None:
        """Count an attempt that did not, and used `most` at most."""
        self.lost_attempts += 1
        self.lost_tokens += most.total
        self.lost_cost += cost

    def values(self) -> dict[str, float]:
        """The counts by name, `fault_<kind>` for every kind; latencies (seconds) only where anything was
        answered."""
        return {
            **ChatWindow.values(self),
            **{name: float(getattr(self, name)) for name in HTTP_COUNTS},
            **{f"fault_{fault.value}": float(self.faults[fault]) for fault in Fault},
        }
