"""Turns, dialogues, personas and samples that are as small as they can be; a test names what it is about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlver_dist.data.persona import HiddenIntent, Persona, Temperament
from rlver_dist.dialogue import Appraisal, Dialogue, EndReason, Turn
from rlver_dist.experience.samples import TurnSample
from rlver_dist.rollout.collector import CollectLimits


def appraisal(change: float = 0.0, **fields: Any) -> Appraisal:
    """An appraisal without words."""
    return Appraisal(**{"content": "", "fit": "", "activity": "", "feeling": "", "change": change, **fields})


def turn(index: int = 0, **fields: Any) -> Turn:
    """A well-formed reply of one token that nobody appraises; every sampled token has a log-prob of -1."""
    values = {
        "prompt_ids": [1],
        "reply_ids": [2],
        "reply": "hm",
        "thinking": "",
        "well_formed": True,
        "truncated": False,
        "emotion_before": 30.0,
        "emotion_after": 30.0,
        "appraisal": None,
        "user_message": None,
        "policy_version": (0, 0),
        **fields,
    }
    values.setdefault("logprobs", [-1.0] * len(values["reply_ids"]))
    return Turn(index=index, **values)


def dialogue(turns: Iterable[Turn] = (), **fields: Any) -> Dialogue:
    """A dialogue that reached its turn limit where it began, at an emotion of 30."""
    values = {
        "id": "d",
        "persona_id": "p",
        "group_id": "g",
        "seed": 1,
        "opening": "hi",
        "start_emotion": 30.0,
        "end_reason": EndReason.MAX_TURNS,
        "final_emotion": 30.0,
        **fields,
    }
    if values["end_reason"] is EndReason.INFRASTRUCTURE:
        values.setdefault("error", "engine lost")
    return Dialogue(turns=list(turns), **values)


def persona(**fields: Any) -> Persona:
    """A passive person who wants to be heard, with an opening and nothing to tell."""
    values = {
        "id": "p",
        "name": "Ada",
        "profile": "",
        "scene": "",
        "temperament": Temperament.PASSIVE,
        "traits": (),
        "hidden_intent": HiddenIntent.BE_HEARD,
        "want": "",
        "hides": "",
        "language": "en",
        "topic": "",
        "situation_id": "s",
        "opening": "Hello",
        "facts": (),
        **fields,
    }
    return Persona(**values)


def sample(token_ids: list[int], loss_mask: list[bool], **fields: Any) -> TurnSample:
    """A row of one dialogue; every trained token has a log-prob of -1."""
    values = {
        "rollout_logprobs": [-1.0 if trained else 0.0 for trained in loss_mask],
        "dialogue_id": "d",
        "group_id": "g",
        "turn_index": 0,
        **fields,
    }
    return TurnSample(token_ids=token_ids, loss_mask=loss_mask, **values)


def limits(**fields: Any) -> CollectLimits:
    """Limits under which nothing but a reply without the format ends a dialogue early."""
    values = {
        "max_turns": 3,
        "max_reply_tokens": 8,
        "max_context_tokens": 1000,
        "end_on_truncation": False,
        "strict_format": True,
        "temperature": 1.0,
        "max_concurrent": 4,
        "request_timeout_s": 5.0,
    }
    return CollectLimits(**values | fields)
