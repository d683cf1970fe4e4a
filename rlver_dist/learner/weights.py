"""Full tensors of the policy under Hugging Face names, whether or not ZeRO-3 has sharded them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlver_dist.learner.engine import TrainingEngine

GATHER_ELEMENTS = 1 << 27
"""Weights that are whole at a time under ZeRO-3: 256 MiB in bfloat16; a single larger tensor is gathered alone."""


def metadata(engine: TrainingEngine) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and full shape of every tensor that `iter_full_tensors` yields, in its order; not collective."""
    return [
        (name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
        for name, parameter in _named_parameters(engine)
    ]


def iter_full_tensors(engine: TrainingEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter whole, on the learner's device and in the model's dtype; collective under ZeRO-3.

    A tied `lm_head.weight` is yielded too, under its own name: vLLM's layerwise reload expects it. Tensors are safe to keep
    until the next update; under ZeRO-3 they are copies.
    """
    for bucket in _buckets(_named_parameters(engine)):
        # Tied names share one parameter; DeepSpeed refuses to gather it twice.
        with engine.gathered({id(parameter): parameter for _, parameter in bucket}.values()):
            tensors = [(name, parameter.detach().clone() if engine.zero_stage == 3 else parameter.detach()) for name, parameter in bucket]
        yield from tensors


def _named_parameters(engine: TrainingEngine) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.model.named_parameters(remove_duplicate=False))


def _buckets(named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        elements = getattr(parameter, "ds_numel", parameter.numel())
        if bucket and size + elements > GATHER_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += elements
    yield bucket
