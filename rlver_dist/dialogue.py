"""The record of one conversation: `Message`, `Appraisal`, `Turn`, `Dialogue`, `EndReason`.

A dialogue opens with the simulated user's message; each `Turn` is the policy's reply, the user's appraisal of
it and the user's next message. Everything here is plain data: token ids are lists, log-probs are floats in
nats, so that a dialogue can be sent between processes, written to Parquet and compared with `==`. A record is
made once, when everything in it is known, and never changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

MIN_EMOTION = 0.0
MAX_EMOTION = 100.0
"""Ends of the scale of emotion; a reward is the final emotion / `MAX_EMOTION`."""


class Role(str, Enum):
    """Who speaks, in the words of chat templates."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


# The values stand in the ledger's files and in metric keys, so that renaming one breaks both.
class EndReason(str, Enum):
    """Why a dialogue ended: the first four because of the user or the turn limit, the next three because of
    the policy's reply, the last because of a failed machine."""

    EMOTION_HIGH = "emotion_high"
    """Emotion reached its ceiling, 100: the user leaves content (a success in SAGE's terms)."""
    EMOTION_LOW = "emotion_low"
    """Emotion fell below its floor, 10: the user gives up (a failure in SAGE's terms)."""
    GOODBYE = "goodbye"
    """The user ended the dialogue for another reason."""
    MAX_TURNS = "max_turns"
    """The turn limit was reached."""
    MALFORMED = "malformed"
    """The policy's reply had no text for the user (empty, or the format was broken)."""
    OVER_LONG = "over_long"
    """The policy's reply hit the token limit and the run treats that as an end."""
    CONTEXT_OVERFLOW = "context_overflow"
    """The next prompt plus one full reply would not fit into the model's context, counted in tokens."""
    INFRASTRUCTURE = "infrastructure"
    """An engine or a service failed; the dialogue carries `error`, gets no reward and is excluded from the
    loss."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Message:
    """One message as the other side hears it; never holds what the policy thought."""

    role: Role
    text: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Appraisal:
    """The user's appraisal of one reply, in SAGE's named steps (arXiv:2505.02847, section 2.3).

    Attributes:
        content: what the reply was taken to say.
        fit: how it met or missed the hidden intent.
        activity: the user's inner activity on hearing it.
        feeling: the feeling that results.
        change: emotion change in points, already clipped to the preset's limit.
        features: the rounded numbers that the rules used, by name (similarities, fluency, penalties); the
            change can be computed again from them. A chat model's appraisal counts here what was taken out
            of the reply before the model saw it (`fence_...`).
        source: what judged, as JSON: model, calls a turn, temperature, seed and prompts; empty for the
            embedded rules.
    """

    content: str
    fit: str
    activity: str
    feeling: str
    change: float
    features: dict[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class Turn:
    """One exchange: the policy's reply, its appraisal, and the user's next message.

    Attributes:
        index: 0 for the first reply.
        prompt_ids: `[P]` token ids that the engine was given.
        reply_ids: `[R]` token ids as sampled, end token included where one was sampled.
        logprobs: `[R]` log-probability in nats of each sampled id under the sampling distribution.
        reply: the text that the user hears.
        thinking: text that the user does not hear; empty in no-think mode.
        well_formed: the reply kept the format: text for the user, with thinking before it where thinking is
            asked for.
        truncated: the reply hit the token limit.
        emotion_before: emotion (0 to 100) before the reply.
        emotion_after: emotion after it; equal to `emotion_before` where the reply was never appraised.
        appraisal: None where the reply ended the dialogue before an appraisal.
        user_message: the user's next message; None where there is none.
        policy_version: first and last weight version that sampled the reply.
        thinking_tokens: leading tokens of `reply_ids` up to and including the tag that closes the thinking; 0
            without one.
    """

    index: int
    prompt_ids: list[int]
    reply_ids: list[int]
    logprobs: list[float]
    reply: str
    thinking: str
    well_formed: bool
    truncated: bool
    emotion_before: float
    emotion_after: float
    appraisal: Appraisal | None
    user_message: str | None
    policy_version: tuple[int, int]
    thinking_tokens: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Dialogue:
    """A dialogue that has ended.

    Attributes:
        id: unique within a run and equal for equal (iteration, group, member).
        persona_id: who the user was.
        group_id: dialogues with one group id share persona and opening, and are compared by GRPO.
        seed: seeds the user and, per turn, the sampling.
        opening: the user's first message; empty where the user failed before it.
        start_emotion: emotion before the first reply, 0 to 100; 0 where the user failed before the opening.
        turns: in order; empty where nothing was sampled.
        end_reason: why it ended.
        final_emotion: emotion at the end, 0 to 100: after the last appraisal, else the start emotion.
        error: one line, only with `EndReason.INFRASTRUCTURE`.
    """

    id: str
    persona_id: str
    group_id: str
    seed: int
    opening: str
    start_emotion: float
    turns: list[Turn]
    end_reason: EndReason
    final_emotion: float
    error: str | None = None

    def messages(self) -> list[Message]:
        """What both sides heard, from the opening on."""
        heard = [Message(role=Role.USER, text=self.opening)]
        for turn in self.turns:
            heard.append(Message(role=Role.ASSISTANT, text=turn.reply))
            # The last turn has none where the reply or the user ended the dialogue.
            if turn.user_message is not None:
                heard.append(Message(role=Role.USER, text=turn.user_message))
        return heard


def completed(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    """Those that infrastructure did not end, in their order."""
    return [dialogue for dialogue in dialogues if dialogue.end_reason is not EndReason.INFRASTRUCTURE]
