"""What calls of a chat model took and used up since somebody last looked."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlver_dist.chat_client.protocol import ChatAnswer
from rlver_dist.latency import latency_metrics


@dataclass(kw_only=True, slots=True)
class ChatWindow:
    """Counts over a window.

    Attributes:
        calls: requests; one counts once, however many attempts it takes.
        failures: calls that failed for good.
        cancelled: calls that their caller gave up, mostly at a deadline; neither answered nor failed.
        retries: attempts after a call's first.
        latencies_s: seconds of each answered call, retries included.
        prompt_tokens, cached_tokens, completion_tokens: of answered calls.
    """

    calls: int = 0
    failures: int = 0
    cancelled: int = 0
    retries: int = 0
    latencies_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: ChatAnswer) -> None:
        """Count an answered call."""
        self.calls += 1
        self.retries += answer.retries
        self.latencies_s.append(answer.seconds)
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.completion_tokens += answer.completion_tokens

    def fail(self) -> None:
        """Count a call that failed for good."""
        self.calls += 1
        self.failures += 1

    def cancel(self) -> None:
        """Count a call that its caller gave up."""
        self.calls += 1
        self.cancelled += 1

    def values(self) -> dict[str, float]:
        """The counts by name; latencies (seconds) only where anything was answered."""
        counts = (
            "calls",
            "failures",
            "cancelled",
            "retries",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
        )
        return {
            **{name: float(getattr(self, name)) for name in counts},
            **latency_metrics("latency", self.latencies_s),
        }
