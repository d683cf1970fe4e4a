"""One row of the ledger: a dialogue, what it was paid, and the hashes that tie each appraisal to what was
appraised.

`to_row` and `from_row` turn a record into plain values and back without loss; `parquet.py` puts the rows on
disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlver_dist.dialogue import Appraisal, Dialogue, EndReason, Message, Turn

Row = dict[str, Any]
"""Plain values (numbers, text, lists and rows) by column name, as pyarrow takes and gives them."""


class Phase(str, Enum):
    """The stage of a run that sampled the dialogues."""

    train = "train"
    """Training."""
    before = "before"
    """The evaluation before reinforcement learning, after the warm-up where there is one."""
    after = "after"
    """The evaluation at the end."""
    control = "control"
    """The evaluation of the base model, before the warm-up."""
    warm_up = "warm_up"
    """The warm-up, which learns from these dialogues."""


@dataclass(kw_only=True, slots=True, frozen=True)
class DialogueRecord:
    """A dialogue as the ledger keeps it.

    Attributes:
        dialogue: every field of it.
        iteration: the training iteration that it belongs to.
        phase: see `Phase`.
        reward: 0 to 1; None where it was never scored (an infrastructure failure).
        advantage: None outside training and where the dialogue was excluded from the loss.
        appraisal_inputs: `[turns]` SHA-256 of what each appraisal saw (`appraisal_hashes`); None where there
            was no appraisal.
    """

    dialogue: Dialogue
    iteration: int
    phase: Phase
    reward: float | None
    advantage: float | None
    appraisal_inputs: list[str | None]


def input_hash(persona_id: str, messages: Sequence[Message]) -> str:
    """SHA-256, in hex, of one appraisal's inputs.

    Args:
        persona_id: of the user that appraised.
        messages: the dialogue so far, the appraised reply last.
    """
    # JSON without white space and in ASCII is one byte string for equal inputs, in every language.
    canonical = json.dumps(
        [persona_id, [[message.role.value, message.text] for message in messages]], separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def appraisal_hashes(dialogue: Dialogue) -> list[str | None]:
    """`[turns]` `input_hash` of each appraisal in one dialogue; None where a turn was not appraised."""
    messages = dialogue.messages()
    hashes: list[str | None] = []
    num_messages = 1  # the opening
    for turn in dialogue.turns:
        num_messages += 1
        hashes.append(
            input_hash(dialogue.persona_id, messages[:num_messages]) if turn.appraisal is not None else None
        )
        num_messages += turn.user_message is not None
    return hashes


def to_row(record: DialogueRecord) -> Row:
    """The record as one row; its keys are the columns of `parquet.SCHEMA`."""
    dialogue = record.dialogue
    turns = zip(dialogue.turns, record.appraisal_inputs, strict=True)
    return {
        "iteration": record.iteration,
        "phase": record.phase.value,
        "reward": record.reward,
        "advantage": record.advantage,
        "id": dialogue.id,
        "persona_id": dialogue.persona_id,
        "group_id": dialogue.group_id,
        "seed": dialogue.seed,
        "opening": dialogue.opening,
        "start_emotion": dialogue.start_emotion,
        "turns": [_turn_to_row(turn, inputs) for turn, inputs in turns],
        "end_reason": dialogue.end_reason.value,
        "final_emotion": dialogue.final_emotion,
        "error": dialogue.error,
    }


def from_row(row: Row) -> DialogueRecord:
    """The record that `to_row` made `row` from, equal in every field."""
    dialogue = Dialogue(
        id=row["id"],
        persona_id=row["persona_id"],
        group_id=row["group_id"],
        seed=row["seed"],
        opening=row["opening"],
        start_emotion=row["start_emotion"],
        turns=[_turn_from_row(turn) for turn in row["turns"]],
        end_reason=EndReason(row["end_reason"]),
        final_emotion=row["final_emotion"],
        error=row["error"],
    )
    return DialogueRecord(
        dialogue=dialogue,
        iteration=row["iteration"],
        phase=Phase(row["phase"]),
        reward=row["reward"],
        advantage=row["advantage"],
        appraisal_inputs=[turn["appraisal_inputs"] for turn in row["turns"]],
    )


def _turn_to_row(turn: Turn, inputs: str | None) -> Row:
    first, last = turn.policy_version
    return {
        "index": turn.index,
        "prompt_ids": turn.prompt_ids,
        "reply_ids": turn.reply_ids,
        "logprobs": turn.logprobs,
        "reply": turn.reply,
        "thinking": turn.thinking,
        "thinking_tokens": turn.thinking_tokens,
        "well_formed": turn.well_formed,
        "truncated": turn.truncated,
        "emotion_before": turn.emotion_before,
        "emotion_after": turn.emotion_after,
        "appraisal": None if turn.appraisal is None else _appraisal_to_row(turn.appraisal),
        "appraisal_inputs": inputs,
        "user_message": turn.user_message,
        "policy_version_first": first,
        "policy_version_last": last,
    }


def _turn_from_row(row: Row) -> Turn:
    return Turn(
        index=row["index"],
        prompt_ids=row["prompt_ids"],
        reply_ids=row["reply_ids"],
        logprobs=row["logprobs"],
        reply=row["reply"],
        thinking=row["thinking"],
        thinking_tokens=row["thinking_tokens"],
        well_formed=row["well_formed"],
        truncated=row["truncated"],
        emotion_before=row["emotion_before"],
        emotion_after=row["emotion_after"],
        appraisal=None if row["appraisal"] is None else _appraisal_from_row(row["appraisal"]),
        user_message=row["user_message"],
        policy_version=(row["policy_version_first"], row["policy_version_last"]),
    )


def _appraisal_to_row(appraisal: Appraisal) -> Row:
    return {
        "content": appraisal.content,
        "fit": appraisal.fit,
        "activity": appraisal.activity,
        "feeling": appraisal.feeling,
        "change": appraisal.change,
        "features": [{"name": name, "value": value} for name, value in appraisal.features.items()],
        "source": appraisal.source,
    }


def _appraisal_from_row(row: Row) -> Appraisal:
    return Appraisal(
        content=row["content"],
        fit=row["fit"],
        activity=row["activity"],
        feeling=row["feeling"],
        change=row["change"],
        features={feature["name"]: feature["value"] for feature in row["features"]},
        source=row["source"],
    )
