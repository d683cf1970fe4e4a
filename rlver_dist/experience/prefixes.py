"""Which samples are laid out together, so that a history that several turns of a dialogue have in common is
computed once.

With thinking each turn is a sample of its own: the history as heard, then the turn's thoughts and reply. Each
history extends the one of the turn before, so that all of them are prefixes of the longest. That one becomes
the shared prefix, and each turn's sampled tokens branch off it where that turn's own history ends. What a
token attends to, and so its log-prob and gradient, is the same as in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rlver_dist.experience.samples import TurnSample


@dataclass(kw_only=True, slots=True)
class Unit:
    """Samples that stay together in one packed row.

    Attributes:
        indices: the samples, in the order of their tokens in the row.
        shared_prefix: token ids of the context that they branch off; empty for one sample that is laid out
            whole.
        num_tokens: tokens in the row.
    """

    indices: list[int]
    shared_prefix: list[int]
    num_tokens: int


def make_units(
    samples: Sequence[TurnSample], chosen: Sequence[int], *, share_prefixes: bool, max_tokens: int
) -> list[Unit]:
    """Put the chosen samples into units, each sample into exactly one.

    Args:
        samples: all samples of the iteration.
        chosen: indices of those that are laid out; those of one dialogue stand next to each other.
        share_prefixes: whether samples may have a shared prefix; they have one where that takes fewer tokens.
        max_tokens: largest unit that is made of several samples; one sample may be longer.

    Returns:
        The units, dialogue after dialogue.
    """
    if not share_prefixes:
        return [_alone(samples, index) for index in chosen]
    units: list[Unit] = []
    for _, indices in groupby(chosen, key=lambda index: samples[index].dialogue_id):
        units += _with_shared_prefixes(samples, list(indices), max_tokens)
    return units


def context_length(sample: TurnSample) -> int:
    """Tokens before the first trained one.

    Raises:
        ValueError: none is trained.
    """
    return sample.loss_mask.index(True)


def _with_shared_prefixes(
    samples: Sequence[TurnSample], chosen: list[int], max_tokens: int
) -> Iterator[Unit]:
    """Units of one dialogue: each time the longest context that is left, with all samples that branch off it
    while they fit."""
    contexts = {
        index: samples[index].token_ids[: context_length(samples[index])]
        for index in chosen
        if _branches(samples[index])
    }
    # Without thinking a dialogue is one row in which user messages stand between trained tokens: such a row
    # cannot branch off, and has nothing to share.
    yield from (_alone(samples, index) for index in chosen if index not in contexts)
    while contexts:
        owner = max(contexts, key=lambda index: len(contexts[index]))
        shared_prefix = contexts.pop(owner)
        # Until another sample joins it, the owner is laid out whole: a prefix of its own would save nothing.
        unit = _alone(samples, owner)
        for index, context in list(contexts.items()):
            # The sample's context is in the prefix already, so that it adds its trained tokens alone.
            grown = unit.num_tokens + samples[index].num_trained
            if grown <= max_tokens and shared_prefix[: len(context)] == context:
                unit = Unit(indices=[*unit.indices, index], shared_prefix=shared_prefix, num_tokens=grown)
                del contexts[index]
        # Turn order again: the owner, with the longest history, is the last turn.
        unit.indices.sort()
        yield unit


def _branches(sample: TurnSample) -> bool:
    """Whether the sample is a context and after it trained tokens alone."""
    return (
        not sample.loss_mask[0] and any(sample.loss_mask) and all(sample.loss_mask[context_length(sample) :])
    )


def _alone(samples: Sequence[TurnSample], index: int) -> Unit:
    return Unit(indices=[index], shared_prefix=[], num_tokens=len(samples[index].token_ids))
