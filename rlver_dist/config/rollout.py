"""Options of collecting dialogues."""

from __future__ import annotations

from dataclasses import dataclass

from rlver_dist.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Collecting dialogues."""

    dialogues_per_iteration: int = 128
    """Dialogues an iteration; divided by `algorithm.group_size` it gives the personas (RLVER, train_rlver.sh:
    32 personas)."""
    think: bool = False
    """Ask for `<think>...</think>` before each reply. That part is left out of the history, and the user
    never hears it."""
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
        if self.dialogues_per_iteration < 1:
            raise ConfigError(
                f"rollout.dialogues_per_iteration={self.dialogues_per_iteration}: use 1 or more"
            )
        if self.max_turns < 1:
            raise ConfigError(f"rollout.max_turns={self.max_turns}: use 1 or more")
        if self.max_reply_tokens < 1:
            raise ConfigError(f"rollout.max_reply_tokens={self.max_reply_tokens}: use 1 or more")
        if self.max_thinking_tokens < 1:
            raise ConfigError(f"rollout.max_thinking_tokens={self.max_thinking_tokens}: use 1 or more")
        if self.max_concurrent < 1:
            raise ConfigError(f"rollout.max_concurrent={self.max_concurrent}: use 1 or more")
        if not self.temperature > 0:
            raise ConfigError(f"rollout.temperature={self.temperature}: use a number above 0")
        if not self.request_timeout_s > 0:
            raise ConfigError(f"rollout.request_timeout_s={self.request_timeout_s}: use a number above 0")

    @property
    def max_turn_tokens(self) -> int:
        """Tokens that the policy may sample a turn, thinking included."""
        return self.max_reply_tokens + (self.max_thinking_tokens if self.think else 0)
