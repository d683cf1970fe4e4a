"""What the learner writes for others: a weight file for the rollout engines, and a Hugging Face folder.

A reader never sees a part of either. The learner's own state (optimizer, schedule, counters) is DeepSpeed's
checkpoint: `TrainingEngine.save` and `load`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rlver_dist.files import whole_file, whole_folder
from rlver_dist.learner import weights
from rlver_dist.learner.engine import TrainingEngine


def write_weights(engine: TrainingEngine, path: str, rank: int) -> None:
    """Write all weights, tied head included, as one safetensors file in the model's dtype; every rank calls,
    rank 0 writes.

    Args:
        engine: whose weights.
        path: of the file; its folder is made.
        rank: of the caller.
    """
    tensors = _collect(engine, rank)
    if rank == 0:
        from safetensors.torch import save_file

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(Path(path)) as aside:
            save_file(tensors, aside)
    # No rank returns before the file is there: the caller hands its path to the engines.
    engine.barrier()


def export(engine: TrainingEngine, tokenizer_path: str, directory: str, rank: int) -> None:
    """Write a Hugging Face folder with weights, tokenizer and chat template, replacing `directory`; every
    rank calls, rank 0 writes.

    Args:
        engine: whose weights.
        tokenizer_path: folder or hub id of the tokenizer, which training leaves as it is.
        directory: the folder.
        rank: of the caller.
    """
    tensors = _collect(engine, rank)
    if rank == 0:
        from transformers import AutoTokenizer

        with whole_folder(Path(directory)) as aside:
            engine.model.save_pretrained(aside, state_dict=tensors)
            AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(aside)
    engine.barrier()


def _collect(engine: TrainingEngine, rank: int) -> dict[str, torch.Tensor]:
    """Full tensors in host memory on rank 0; other ranks take part in gathering and keep nothing."""
    tensors: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in weights.iter_full_tensors(engine):
        if rank == 0:
            # To host memory one by one: the whole model need not fit a GPU.
            on_host = tensor.cpu()
            # safetensors refuses two names for one tensor, as a tied head has.
            tensors[name] = on_host.clone() if on_host.data_ptr() in addresses else on_host
            addresses.add(on_host.data_ptr())
    return tensors
