"""The support strategies that a sentence of a reply may use."""

from __future__ import annotations

from enum import Enum


class Strategy(str, Enum):
    """What a sentence of a reply does; the second half are ways to fail."""

    REFLECT_FEELING = "reflect_feeling"
    RESTATE = "restate"
    VALIDATE = "validate"
    PRAISE_EFFORT = "praise_effort"
    OPEN_QUESTION = "open_question"
    ADVICE = "advice"
    PERSPECTIVE = "perspective"
    BALANCE = "balance"
    PROMPT_SELF_REFLECTION = "prompt_self_reflection"
    ABSOLVE = "absolve"
    PRESENCE = "presence"
    SELF_DISCLOSURE = "self_disclosure"
    CONSOLATION = "consolation"
    DISMISS = "dismiss"
    LECTURE = "lecture"
    BLAME = "blame"
    CHANGE_SUBJECT = "change_subject"
    MACHINE_TALK = "machine_talk"
    FLATTERY = "flattery"
    SCORE_TALK = "score_talk"
