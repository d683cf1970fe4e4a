"""How far a reply is language at all, 0 to 1."""

from __future__ import annotations

import torch

from rlver_dist.simulator.rules.embedding import Encoded, one_thread
from rlver_dist.simulator.rules.heads import FluencyHead
from rlver_dist.simulator.sentences import ramp

BROKEN, SOUND = 0.25, 0.75
"""Head probability up to which a sentence is gibberish, and from which it is plainly a sentence."""
SHORT_TOKENS = 4
"""A shorter sentence says too little about order to be judged."""


def reply_fluency(head: FluencyHead, sentences: list[Encoded], truncated: bool) -> float:
    """Fluency of a reply: half the mean over its sentences by length, half its worst one; 0.5 where all are
    too short to judge.

    The last of several sentences is not judged in a reply that was cut at the token limit.

    Args:
        head: trained to tell sentences from corrupted ones.
        sentences: of the reply, one or more.
        truncated: the reply was cut at the token limit.

    Returns:
        0 to 1, rounded to 4 digits.
    """
    whole = sentences[:-1] if truncated and len(sentences) > 1 else sentences
    judged = [one for one in whole if len(one.states) >= SHORT_TOKENS]
    if not judged:
        return 0.5
    with one_thread(), torch.inference_mode():
        chances = [
            float(head(one.states[None], torch.ones(1, len(one.states))).double().sigmoid()) for one in judged
        ]
    scores = [ramp(round(chance, 4), BROKEN, SOUND) for chance in chances]
    lengths = [len(one.states) for one in judged]
    mean = sum(score * length for score, length in zip(scores, lengths, strict=True)) / sum(lengths)
    # The worst sentence counts as much as all others together, or gibberish could hide among good ones.
    return round(0.5 * mean + 0.5 * min(scores), 4)
