"""Moving the learner's weights into vLLM engines, by vLLM's own weight-transfer interface.

On CPUs the learner writes a safetensors file in shared memory and every engine worker reads it:
`SharedFileWeightTransferEngine`, registered in each worker process through the `vllm.general_plugins` entry
point. On GPUs vLLM's NCCL engine receives a broadcast; `nccl_sender` is the learner's half of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    WeightTransferUpdatePayload,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

SHARED_FILE = "shared_file"


def register() -> None:
    """Make the shared-file backend known to vLLM in this process; harmless when called again."""
    if current_platform.is_cpu():
        # vLLM's processes wait for each other by spinning for up to a second, on the very cores that compute:
        # let them sleep. Now and then a sleeper misses its wake-up call, so it looks again after 5 ms instead
        # of 5 s.
        shm_broadcast.SpinCondition.__init__.__defaults__ = (0.0,)
        shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 5
    # vLLM refuses to register a name twice and has no public way to ask for one.
    if SHARED_FILE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHARED_FILE, SharedFileWeightTransferEngine)


@dataclass
class SharedFileInitInfo(WeightTransferInitInfo):
    """A shared file needs no rendezvous."""


@dataclass
class SharedFileUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are: a safetensors file with Hugging Face names, readable by every worker."""

    path: str


class SharedFileWeightTransferEngine(WeightTransferEngine[SharedFileInitInfo, SharedFileUpdateInfo]):
    """Worker side of a weight update through one safetensors file.

    Weights load layer by layer through vLLM's reload machinery: on CPUs linear weights are prepacked and the
    plain parameters are emptied, so they cannot be copied in place.
    """

    init_info_cls = SharedFileInitInfo
    update_info_cls = SharedFileUpdateInfo

    def init_transfer_engine(self, init_info: SharedFileInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Make every layer ready to receive."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Receive one file."""
        # vLLM's own method then waits for the accelerator, which raises where there is none; these copies are
        # synchronous.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedFileUpdateInfo) -> None:
        """Load the file.

        Raises:
            ValueError: a layer got no weights, as happens to a tied output head whose `lm_head.weight` was
                not sent. vLLM would keep its old weights and only log it, a change of log-probs that bfloat16
                hides from the probe.
        """
        load_weights: Callable[..., object] = self.model.load_weights  # type: ignore[assignment]
        load_weights(_read(Path(update_info.path)))
        missing = [name for name, layer in self.model.named_modules() if _got_nothing(layer)]
        if missing:
            raise ValueError(
                f"{update_info.path}: no weights for {', '.join(missing)}; send every tensor, a tied "
                f"lm_head.weight too"
            )

    def finish_weight_update(self) -> None:
        """Bring the layers back into their computing form."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to release."""


def _read(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is not iterable
            yield name, file.get_tensor(name)


def _got_nothing(layer: torch.nn.Module) -> bool:
    info = get_layerwise_info(layer)
    expects_weights = any(True for _ in layer.parameters(recurse=False))
    return info.can_load() and expects_weights and info.load_numel == 0


class LearnerWeights(WeightSource):
    """The learner's full tensors as vLLM's `WeightSource`.

    Args:
        shapes: (name, dtype, full shape) of every tensor, in the order in which `gather` yields them.
        gather: a new pass over (name, full tensor) at each call; a collective of all learner ranks where
            weights are sharded.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        gather: Callable[[], Iterable[tuple[str, torch.Tensor]]],
    ) -> None:
        self._metadata = [ParamMeta(name, dtype, shape) for name, dtype, shape in shapes]
        self._gather = gather

    def metadata(self) -> list[ParamMeta]:
        """Names, formats and full shapes, without moving anything."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        # A gathered tensor may be freed when its gather context closes, while the packed broadcast still
        # reads it: send copies.
        for name, tensor in self._gather():
            yield name, tensor.detach().clone()


@dataclass(kw_only=True, slots=True)
class EngineCalls:
    """vLLM's client protocol for a sender, over plain blocking functions, each of which reaches all engines.

    Attributes:
        workers_per_engine: GPUs of each engine.
        connect: called with one `PolicyEngine.connect` argument for each engine.
        start: `PolicyEngine.start_update` on each.
        receive: called with the argument of `PolicyEngine.receive_update`; returns when every engine has
            received.
        finish: called with the new version, `PolicyEngine.finish_update`.
        version: what the next `send_weights` labels the weights; the caller sets it before each.
    """

    workers_per_engine: tuple[int, ...]
    connect: Callable[[list[dict[str, object]]], None]
    start: Callable[[], None]
    receive: Callable[[WeightTransferUpdatePayload], None]
    finish: Callable[[int], None]
    version: int = 0

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        """Connect all engines; each one's workers get their own ranks in the group, after those of the
        engines before it."""
        # Rank 0 is the learner's; vLLM says where the engines' ranks begin.
        first_rank = init_info["rank_offset"]
        assert isinstance(first_rank, int)
        offsets = itertools.accumulate(self.workers_per_engine[:-1], initial=first_rank)
        self.connect([{**init_info, "rank_offset": offset} for offset in offsets])

    def start_weight_update(self) -> None:
        """Make all engines ready to receive."""
        self.start()

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """Let all engines receive."""
        self.receive(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update. vLLM's NCCL sender names no version, so `version` counts."""
        self.finish(self.version if weight_version is None else int(weight_version))


def nccl_sender(
    *, rank: int, master_address: str, master_port: int, calls: EngineCalls, source: WeightSource
) -> TrainerWeightTransferEngine:
    """The learner's half of the NCCL transfer: connects here, then each `send_weights()` broadcasts all
    weights once.

    Every learner rank calls this and `send_weights()`. Only rank 0 joins the NCCL group, calls the engines
    and broadcasts; the others take part in the gathers of `source`. The engines have to be paused around
    `send_weights()`.

    Written against vLLM 0.32's source; it has never been run, for want of GPUs.
    """
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    world_size = 1 + sum(calls.workers_per_engine)
    init_info = NCCLTrainerInitInfo(
        master_address=master_address, master_port=master_port, world_size=world_size, rank=rank
    )
    return WeightTransferTrainerFactory.trainer_init(init_info, client=calls, source=source)
