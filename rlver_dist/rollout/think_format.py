"""The think format: `<think>what is thought</think>`, then the reply. It is read from text, so that it does
not matter how tags are tokenised."""

from __future__ import annotations

from dataclasses import dataclass

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


@dataclass(kw_only=True, slots=True, frozen=True)
class ParsedReply:
    """What a sampled reply says.

    Attributes:
        thinking: text that the user does not hear, without tags; empty where thinking is not asked for.
        reply: the text that the user hears; never holds a tag where thinking is asked for.
        well_formed: the format was kept.
        thinking_tokens: leading tokens of the reply up to and including the last closing tag; 0 where there
            is none.
    """

    thinking: str
    reply: str
    well_formed: bool
    thinking_tokens: int


def split_thinking(text: str) -> tuple[str, str, bool]:
    """Split a reply into what is thought and what the user hears.

    The format is: white space, one open tag, thinking, one closing tag, reply, neither of them empty. Where
    it is broken, the user hears only what cannot be thinking: the text after the last closing tag, up to an
    open tag that is never closed. All other text counts as thinking.

    Returns:
        Thinking, reply, and whether the format was kept; neither text has tags or outer white space.
    """
    # Without a closing tag `head` is empty and all of the text is `tail`.
    head, _, tail = text.rpartition(CLOSE_TAG)
    reply, _, unclosed = (piece.strip() for piece in tail.partition(OPEN_TAG))
    thinking = f"{head} {unclosed}".replace(OPEN_TAG, " ").replace(CLOSE_TAG, " ").strip()
    one_each = text.count(OPEN_TAG) == text.count(CLOSE_TAG) == 1
    return thinking, reply, one_each and text.lstrip().startswith(OPEN_TAG) and bool(thinking and reply)
