"""Options of collecting dialogues."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.config.checks import at_least, positive


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Collecting dialogues."""

    dialogues_per_iteration: int = 128
    """Dialogues an iteration; divided by `algorithm.group_size` it gives the personas (RLVER, train_rlver.sh:
    32 personas)."""
    think: bool = False
    """Ask for `<think>...</think>` before each reply; what is thought enters neither the history nor the
    user's ears."""
    max_turns: int = 8
    """Replies a dialogue (RLVER, appendix B.3)."""
    max_reply_tokens: int = 1024
    """Tokens a reply; a reply that hits the limit is `truncated`."""
    max_thinking_tokens: int = 1024
    """Tokens that `think` adds to that limit; thinking and reply share the sum."""
    end_on_truncation: bool = False
    """End a dialogue as `over_long` at a truncated reply; else the user hears the cut reply and takes it as
    it is."""
    temperature: float = 1.0
    """Sampling temperature in training (RLVER, appendix B.3); top_p is 1 and top_k off, so that log-probs are
    exact."""
    max_concurrent: int = 256
    """Dialogues in flight."""
    request_timeout_s: float = 600.0
    """Seconds after which one reply or one appraisal counts as an infrastructure failure."""

    def __post_init__(self) -> None:
        at_least(
            1, "rollout.", dialogues_per_iteration=self.dialogues_per_iteration, max_turns=self.max_turns
        )
        at_least(
            1,
            "rollout.",
            max_reply_tokens=self.max_reply_tokens,
            max_thinking_tokens=self.max_thinking_tokens,
        )
        at_least(1, "rollout.", max_concurrent=self.max_concurrent)
        positive("rollout.", temperature=self.temperature, request_timeout_s=self.request_timeout_s)

    @property
    def max_turn_tokens(self) -> int:
        """Tokens that the policy may sample a turn, thinking included."""
        return self.max_reply_tokens + (self.max_thinking_tokens if self.think else 0)
