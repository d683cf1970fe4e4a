"""Which samples are laid out together, so that a history that several turns of a dialogue share is computed
once.

With thinking each turn is a sample of its own: the history as heard, then the turn's thoughts and reply. The
histories grow along one line, so the longest holds all others at its front: it becomes the shared prefix, and
each turn's sampled tokens branch off it where that turn's own history ends. What a token attends to, and so
its log-prob and gradient, is the same as in a row of its own.
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
    samples: Sequence[TurnSample], part: Sequence[int], *, share: bool, max_tokens: int
) -> list[Unit]:
    """Put the samples at `part` into units, each sample into exactly one.

    Args:
        samples: all samples of the iteration.
        part: which of them; those of one dialogue stand next to each other.
        share: whether samples may share a shared prefix; they do where that takes fewer tokens.
        max_tokens: largest unit that is made of several samples; one sample may be longer.
    """
    if not share:
        return [_alone(samples, index) for index in part]
    units: list[Unit] = []
    for _, chosen in groupby(part, key=lambda index: samples[index].dialogue_id):
        units += _share(samples, list(chosen), max_tokens)
    return units


def context_length(sample: TurnSample) -> int:
    """Tokens before the first trained one."""
    return sample.loss_mask.index(True)


def _share(samples: Sequence[TurnSample], chosen: list[int], max_tokens: int) -> Iterator[Unit]:
    """Units of one dialogue: each time the longest context that is left, with all samples that branch off it
    while they fit."""
    contexts = {
        index: samples[index].token_ids[: context_length(samples[index])]
        for index in chosen
        if _branches(samples[index])
    }
    yield from (_alone(samples, index) for index in chosen if index not in contexts)
    while contexts:
        owner = max(contexts, key=lambda index: len(contexts[index]))
        shared_prefix, unit = contexts.pop(owner), _alone(samples, owner)
        for index, context in list(contexts.items()):
            grown = unit.num_tokens + samples[index].num_trained
            if grown <= max_tokens and shared_prefix[: len(context)] == context:
                unit = Unit(indices=[*unit.indices, index], shared_prefix=shared_prefix, num_tokens=grown)
                del contexts[index]
        unit.indices.sort()
        yield unit


def _branches(sample: TurnSample) -> bool:
    """Whether the sample is a context and after it trained tokens alone."""
    return (
        not sample.loss_mask[0] and any(sample.loss_mask) and all(sample.loss_mask[context_length(sample) :])
    )


def _alone(samples: Sequence[TurnSample], index: int) -> Unit:
    return Unit(indices=[index], shared_prefix=[], num_tokens=len(samples[index].token_ids))
