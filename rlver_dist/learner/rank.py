"""What one rank of policy and critic learner have in common: its place among the ranks, its share of the
samples, its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from rlver_dist.config.learner import LearnerConfig
from rlver_dist.learner.engine import TrainingEngine, start_rank
from rlver_dist.learner.rows import share_rows


class LearnerRank:
    """One rank of a learner; a subclass builds `_engine`. Every method is collective."""

    _engine: TrainingEngine

    def __init__(
        self,
        options: LearnerConfig,
        *,
        rank: int,
        world_size: int,
        master_address: str,
        master_port: int,
        device: Literal["cpu", "gpu"],
        num_threads: int,
    ) -> None:
        """Join the process group.

        Args:
            options: of this learner.
            rank: 0 to world_size - 1.
            world_size: learner processes.
            master_address: host of rank 0.
            master_port: free TCP port there.
            device: what to compute on.
            num_threads: compute threads on the host; 0 leaves torch's choice.
        """
        self._rank, self._world_size = rank, world_size
        self._done = self._todo = 0
        self._device = start_rank(
            rank=rank,
            world_size=world_size,
            master_address=master_address,
            master_port=master_port,
            device=device,
            num_threads=num_threads,
        )
        self._share = partial(
            share_rows,
            rank=rank,
            world_size=world_size,
            max_tokens=options.micro_batch_tokens,
            share=options.share_prefixes,
            device=self._device,
        )

    def progress(self) -> tuple[int, int]:
        """What the call at hand has done and all that it has to do on this rank; 0 and 0 outside of one. May
        be asked from any thread."""
        return self._done, self._todo

    @contextmanager
    def _counting(self, todo: int) -> Iterator[None]:
        """A call with `todo` to do; `_done` counts inside the block."""
        self._done, self._todo = 0, todo
        try:
            yield
        finally:
            self._done = self._todo = 0

    def save(self, directory: str) -> None:
        """Write the state that `load` needs to go on: what learns, optimizer, schedule and step counter."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote, with the same number of ranks."""
        self._engine.load(directory)

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self._engine.close()
