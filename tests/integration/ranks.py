"""Learner ranks in spawned processes of their own, since DeepSpeed keeps process-wide state."""

import socket

import torch

NAMES = {1: ("one_rank",), 2: ("two_ranks_0", "two_ranks_1")}
"""Where each rank writes what it found, by the number of ranks."""


def place(rank, world_size, port):
    """Where a learner's rank stands, as its constructor takes it."""
    return dict(rank=rank, world_size=world_size, master_address="127.0.0.1", master_port=port, device="cpu", num_threads=1)


def run_ranks(target, world_size, folder):
    """Run `target(rank, port, folder)` on every rank at once; returns what each one saved under its name in `NAMES`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(target, (port, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in NAMES[world_size]]
