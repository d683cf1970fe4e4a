"""Full tensors of the policy under Hugging Face names, whether or not ZeRO-3 has sharded them and LoRA has
split them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlver_dist.learner import lora
from rlver_dist.learner.engine import TrainingEngine

GATHER_ELEMENTS = 1 << 27
"""Weights that are whole at a time under ZeRO-3: 256 MiB in bfloat16; a single larger tensor is gathered
alone."""
Metadata = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and full shape of tensors."""


def metadata(engine: TrainingEngine) -> Metadata:
    """Name, dtype and full shape of every tensor that `iter_full_tensors` yields, in its order; not
    collective."""
    # A parameter that ZeRO-3 has sharded has no elements of its own; DeepSpeed notes its shape beside it.
    return [
        (weight.name, weight.base.dtype, tuple(getattr(weight.base, "ds_shape", weight.base.shape)))
        for weight in lora.named_weights(engine.model)
    ]


def iter_full_tensors(engine: TrainingEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight whole and merged, on the learner's device and in the model's dtype; collective under
    ZeRO-3.

    A tied `lm_head.weight` is yielded too, under its own name: vLLM's layerwise reload expects it. Tensors
    are safe to keep until the next update; under ZeRO-3 they are copies, and so are weights with an adapter.
    """
    # The whole model at once may not fit one GPU under ZeRO-3, and one tensor at a time would take a
    # collective for each of hundreds of small ones.
    for bucket in _buckets(lora.named_weights(engine.model)):
        # Tied names share one parameter; DeepSpeed refuses to gather it twice.
        distinct = {id(parameter): parameter for weight in bucket for parameter in weight.parameters}
        with engine.gathered(distinct.values()):
            tensors = [(weight.name, weight.merged()) for weight in bucket]
            if engine.zero_stage == 3:
                # What shares a gathered parameter's memory is gone after the block.
                tensors = [(name, tensor.clone()) for name, tensor in tensors]
        # Outside of the block, so that what the reader does with them holds no gathered memory.
        yield from tensors


def _buckets(weights: list[lora.Weight]) -> Iterator[list[lora.Weight]]:
    """`weights` in their order, in lists of at most `GATHER_ELEMENTS` elements."""
    bucket: list[lora.Weight] = []
    size = 0
    for weight in weights:
        elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in weight.parameters)
        if bucket and size + elements > GATHER_ELEMENTS:
            yield bucket
            bucket = []
            size = 0
        bucket.append(weight)
        size += elements
    yield bucket
