"""The learner's side of a weight transfer over NCCL; GPUs only.

The one place where vLLM enters a DeepSpeed process: vLLM's NCCL sender has no other home. It is imported when
the engines are connected, so a learner that writes a file for them never loads vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from rlver_dist.learner.weights import Metadata


class TransferTargets(Protocol):
    """The rollout engines as rank 0 calls them: each call blocks until all engines have answered."""

    workers_per_engine: tuple[int, ...]
    """GPUs of each engine."""

    def connect(self, init_infos: Sequence[dict[str, object]]) -> None:
        """Let each engine join the transfer group with its own of `init_infos`."""

    def start_update(self) -> None:
        """Make all engines ready to receive."""

    def receive_update(self, update_info: object) -> None:
        """Let all engines receive all weights; `update_info` is vLLM's own payload, passed on as it is."""

    def finish_update(self, version: int) -> None:
        """Let all engines compute with the new weights, labelled `version`."""


class WeightBroadcast:
    """A learner rank's membership in the transfer group of rank 0 and all engine workers."""

    def __init__(
        self,
        *,
        rank: int,
        address: str,
        port: int,
        engines: TransferTargets,
        metadata: Metadata,
        gather: Callable[[], Iterable[tuple[str, Tensor]]],
    ) -> None:
        """Connect the engines; every learner rank calls this.

        Args:
            rank: of the learner; 0 joins the group and calls the engines, the others only gather.
            address: host of rank 0.
            port: free TCP port there.
            engines: who receives.
            metadata: name, dtype and full shape of every tensor, in the order of `gather`.
            gather: a new pass over (name, full tensor) at each call; collective under ZeRO-3.
        """
        from rlver_dist.rollout.weight_transfer import EngineCalls, LearnerWeights, nccl_sender

        self._calls = EngineCalls(
            workers_per_engine=engines.workers_per_engine,
            connect=engines.connect,
            start=engines.start_update,
            receive=engines.receive_update,
            finish=engines.finish_update,
        )
        self._sender = nccl_sender(
            rank=rank,
            master_address=address,
            master_port=port,
            calls=self._calls,
            source=LearnerWeights(metadata, gather),
        )

    def send(self, version: int) -> None:
        """Broadcast all weights once, labelled `version`; every learner rank calls, the engines are
        paused."""
        # vLLM's sender passes no version on, so it is left with the calls that the sender makes.
        self._calls.version = version
        self._sender.send_weights()
