"""What one rank of policy and critic learner have in common: its place among the ranks, its rows of the
samples, its progress and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlver_dist.config.enums import Device
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.experience.packing import PackedRow
from rlver_dist.experience.samples import TurnSample
from rlver_dist.learner.engine import TrainingEngine, start_rank
from rlver_dist.learner.rows import rank_rows
from rlver_dist.learner.tally import Tally


@dataclass(kw_only=True, slots=True, frozen=True)
class RankPlace:
    """Where one rank of a learner stands.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: learner processes.
        device: what to compute on, never `auto`; a GPU rank sees exactly one GPU.
        num_threads: compute threads on the host; 0 leaves torch's choice.
    """

    rank: int
    world_size: int
    device: Device
    num_threads: int

    @property
    def torch_device(self) -> torch.device:
        """The device that the rank computes on."""
        return torch.device("cpu" if self.device is Device.cpu else "cuda:0")


class LearnerRank:
    """One rank of a learner, one a process. A subclass adds `start`, which builds the engine.

    Every method but `progress` is collective: it is called on all ranks with equal arguments.
    """

    def __init__(self, options: LearnerConfig, place: RankPlace) -> None:
        """Nothing is loaded yet: rank 0's address and port, which `start` takes, are known only once its
        process runs."""
        self._options = options
        self._place = place
        self._rank = place.rank
        self._world_size = place.world_size
        self._device = place.torch_device
        self._running: TrainingEngine | None = None
        self._done = 0
        self._todo = 0

    def _join(self, master_address: str, master_port: int) -> None:
        """Join the process group at rank 0's address and a free TCP port there."""
        start_rank(
            rank=self._rank,
            world_size=self._world_size,
            master_address=master_address,
            master_port=master_port,
            device=self._place.device,
            num_threads=self._place.num_threads,
        )

    @property
    def _engine(self) -> TrainingEngine:
        if self._running is None:
            raise RuntimeError(f"{type(self).__name__} is used before start() or after close()")
        return self._running

    def _rows(self, samples: Sequence[TurnSample], indices: Sequence[int]) -> list[PackedRow]:
        """This rank's packed rows of the samples at `indices`; as many on every rank."""
        return rank_rows(
            samples,
            indices,
            rank=self._rank,
            world_size=self._world_size,
            max_tokens=self._options.micro_batch_tokens,
            share_prefixes=self._options.share_prefixes,
            device=self._device,
        )

    def progress(self) -> tuple[int, int]:
        """What the call at hand has done and all that it has to do on this rank; 0 and 0 outside of one.

        May be asked from any thread, also before `start`.
        """
        return self._done, self._todo

    @contextmanager
    def _counting(self, todo: int) -> Iterator[None]:
        """A call with `todo` to do; `_done` counts inside the block."""
        # Two plain numbers without a lock: whoever asks from another thread draws a progress bar.
        self._done = 0
        self._todo = todo
        try:
            yield
        finally:
            self._done = 0
            self._todo = 0

    def _step(self, of_step: Tally, tally: Tally) -> bool:
        """Take an optimizer step and pool in `tally` what was measured for it, and the gradient's norm.

        Returns whether it was taken; one that the engine left out counts nowhere.
        """
        norm = self._engine.step()
        if norm is None:
            return False
        tally.merge(of_step)
        tally.add("grad_norm", norm, 1)
        return True

    def save(self, directory: str) -> None:
        """Write the state that `load` needs to go on: what learns, optimizer, schedule and step counter."""
        self._engine.save(directory)

    def load(self, directory: str) -> None:
        """Go on from what `save` wrote, with the same number of ranks."""
        self._engine.load(directory)

    def close(self) -> None:
        """Free the engine and leave the process group; harmless before `start`, and when called again."""
        if self._running is not None:
            self._running.close()
            self._running = None
