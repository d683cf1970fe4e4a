"""The one importer of DeepSpeed: starting a rank, and an engine with exact gradients.

DeepSpeed divides gradients by accumulation steps and by ranks. Losses here are already divided by global
counts, so the first is switched off (`managed_gradient_accumulation: false`: `backward` accumulates, `step`
is the boundary) and the second is undone by multiplying the loss by the number of ranks.

    python -m rlver_dist.learner.engine --build-ops

compiles DeepSpeed's shared-memory op ahead of the first start.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlver_dist.config.enums import Device, Precision
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.errors import RlverError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
DeepSpeedConfig = dict[str, Any]
"""DeepSpeed's configuration: its own keys, some of them groups."""


def _prepare_environment(device: Device) -> None:
    """Settings that DeepSpeed reads when it is imported."""
    if device is Device.cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # The op is built with ninja, which may be installed beside this interpreter without being on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _quiet() -> AbstractContextManager[object]:
    """Drop what DeepSpeed prints (memory figures, build notices); errors are raised, and warnings go to its
    logger."""
    return redirect_stdout(io.StringIO())


def build_ops() -> None:
    """Compile the op that DeepSpeed loads at its first start on CPUs, so that the first run does not wait for
    it."""
    _prepare_environment(Device.cpu)
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


def start_rank(
    *, rank: int, world_size: int, master_address: str, master_port: int, device: Device, num_threads: int
) -> None:
    """Join the learner's process group; call once a process, before anything else here.

    Args:
        rank: 0 to world_size - 1.
        world_size: learner processes.
        master_address: host of rank 0.
        master_port: free TCP port there.
        device: never `auto`; a GPU rank sees exactly one GPU.
        num_threads: compute threads on the host; 0 leaves torch's choice.
    """
    _prepare_environment(device)
    if num_threads:
        torch.set_num_threads(num_threads)
    settings = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": master_address,
        "MASTER_PORT": master_port,
        "LOCAL_RANK": 0,
    }
    if device is Device.cpu:
        # DeepSpeed's shared-memory collectives ask how many ranks are on this machine.
        settings["LOCAL_SIZE"] = world_size
    os.environ.update({name: str(value) for name, value in settings.items()})
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    backend = "gloo" if device is Device.cpu else "nccl"
    with _quiet():
        deepspeed.init_distributed(
            dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, rank=rank, world_size=world_size, verbose=False
        )
    if device is Device.cpu:
        _unlink_buffer(master_address, master_port, rank)


def _unlink_buffer(master_address: str, master_port: int, rank: int) -> None:
    """Take the name off DeepSpeed's shared-memory buffer, 66 MiB that it never removes; ranks have it open
    once all have started."""
    torch.distributed.barrier()
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{master_address}_{master_port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def return_freed_memory() -> None:
    """Give freed memory back to the system: activations of changing sizes leave glibc's heap full of holes
    that only grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def deepspeed_config(config: LearnerConfig, dtype: Precision) -> DeepSpeedConfig:
    """DeepSpeed's configuration for a learner: exact accumulation, float32 gradients and master weights.

    With the optimizer offloaded, ZeRO 1 and 2 sum a step's micro-batches in the model's own dtype whatever is
    asked for here.
    """
    zero: DeepSpeedConfig = {
        "stage": config.zero_stage,
        "overlap_comm": False,
        # Whole weights leave through `weights.iter_full_tensors`, a bucket at a time.
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # DeepSpeed asks for sizes to divide by; rows are of any size, and nothing is divided here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without ZeRO, DeepSpeed clips but does not report the norm; TrainingEngine does both then.
        "gradient_clipping": config.grad_clip if config.zero_stage else 0.0,
        "bf16": {"enabled": dtype is Precision.bfloat16},
        # Summed in bfloat16, the small gradients of many rows would be rounded away.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW steps on the host too; DeepSpeed's own would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


@contextmanager
def sharded_construction(settings: DeepSpeedConfig) -> Iterator[None]:
    """Under ZeRO-3, transformers loads weights straight into shards inside the block; models loaded outside
    it stay whole."""
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps a weak reference, so the name is what holds it.
    marker = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del marker


def _lr_factor(step: int, warmup: int, decay_steps: int | None) -> float:
    """What the learning rate is multiplied by at optimizer step `step`, from 0 on."""
    rise = min(1.0, (step + 1) / warmup)
    return rise if decay_steps is None else rise * max(0.0, 1 - step / decay_steps)


class TrainingEngine:
    """A DeepSpeed engine with AdamW and a linear schedule, whose gradient is exactly the sum of the losses'
    gradients over ranks.

    Parameters that do not require gradients are left as they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        config: LearnerConfig,
        settings: DeepSpeedConfig,
        world_size: int,
        tag: str = "policy",
        decay_steps: int | None = None,
    ) -> None:
        """Wrap `model`; every rank calls it with the same arguments.

        Args:
            model: what is trained.
            config: learning rate, its warm-up, and what AdamW, clipping and ZeRO take.
            settings: `deepspeed_config` of it.
            world_size: ranks.
            tag: names the learner in checkpoints and errors.
            decay_steps: steps from the first on over which the learning rate falls to 0, from the warm-up's;
                None keeps it.
        """
        import deepspeed

        self.world_size = world_size
        self.zero_stage = config.zero_stage
        self._tag = tag
        self._grad_clip = config.grad_clip
        self._plain_norm = math.nan
        self._max_skipped_steps = config.max_skipped_steps
        self._skipped_in_a_row = 0
        # What is frozen, such as all but the adapters under LoRA, gets no optimizer state.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._options: dict[str, Any] = {
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "weight_decay": config.weight_decay,
        }
        optimizer = torch.optim.AdamW(trained, **self._options, fused=True)
        warmup = max(1, config.warmup_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _lr_factor(step, warmup, decay_steps)
        )
        if config.zero_stage == 0:
            # Right before AdamW applies it, the gradient is summed over micro-batches and ranks.
            optimizer.register_step_pre_hook(self._clip)
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings
            )

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model in a wrapped `PolicyModel`; under ZeRO-3 its parameters are shards outside
        of `gathered`."""
        return self._engine.module.model

    @property
    def num_steps(self) -> int:
        """Optimizer steps taken since the start of training, over resumes."""
        return self._engine.global_steps

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._engine.optimizer.param_groups[0]["lr"]

    def forward(self, *inputs: object) -> Any:
        """The model's forward pass, collective under ZeRO-3; in training mode exactly where gradients are
        on.

        Args:
            inputs: what the model's own `forward` takes.

        Returns:
            What it gives.
        """
        # transformers recomputes activations (`gradient_checkpointing`) in training mode alone.
        self._engine.train(torch.is_grad_enabled())
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss to what the next `step` applies.

        Args:
            loss: scalar; this rank's summand of a loss that is already divided by global counts.
        """
        # DeepSpeed averages gradients over ranks, and the ranks' losses are summands of one loss. AdamW
        # would hide a wrong factor, clipping and the reported norm would not.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float | None:
        """Clip, apply and clear the gradient; one that is not finite is cleared alone, and changes nothing.

        Returns:
            The gradient's global norm before clipping; None where it was not finite.

        Raises:
            RlverError: more than `max_skipped_steps` in a row were not.
        """
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self.zero_stage else self._plain_norm
        # ZeRO skips such a step by itself and reports its norm as -1 or as infinite.
        if math.isfinite(norm) and norm >= 0:
            self._skipped_in_a_row = 0
            return float(norm)
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self._max_skipped_steps:
            raise RlverError(
                f"{self._tag}: the gradient was not finite in {self._skipped_in_a_row} optimizer steps in a "
                f"row, the last of them step {self.num_steps}; lower its lr, resume the last checkpoint"
            )
        return None

    def require_finite_weights(self) -> None:
        """Check every weight on every rank; collective.

        Raises:
            RlverError: some are not finite.
        """
        finite = torch.ones(1, device=next(self._engine.module.parameters()).device)
        for parameter in self._engine.module.parameters():
            # Under ZeRO-3 the parameter itself is empty between steps and each rank holds a shard.
            held = getattr(parameter, "ds_tensor", None)
            if held is None:
                held = parameter.detach()
            else:
                # The last shards are filled up with whatever was in memory there.
                before = torch.distributed.get_rank() * held.numel()
                held = held.detach()[: max(0, parameter.ds_numel - before)]
            finite *= torch.isfinite(held).all()
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise RlverError(
                f"{self._tag}: weights are not finite after optimizer step {self.num_steps}; lower its lr, "
                f"resume the last checkpoint"
            )

    def _clip(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._plain_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._grad_clip))
        if not math.isfinite(self._plain_norm):
            # AdamW leaves a parameter without a gradient as it is.
            for parameter in parameters:
                parameter.grad = None

    def gathered(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[object]:
        """Inside the block the parameters are whole on every rank; collective under ZeRO-3."""
        if self.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    def barrier(self) -> None:
        """Wait for every rank."""
        torch.distributed.barrier()

    def save(self, directory: str) -> None:
        """Write model, optimizer, schedule and step counter under `directory`; every rank calls."""
        # No file `latest`: which checkpoint counts is for the run to say, once all of its parts are there.
        with _quiet():
            self._engine.save_checkpoint(directory, tag=self._tag, save_latest=False)

    def load(self, directory: str) -> None:
        """Restore what `save` wrote; every rank calls, with as many ranks as saved. The configuration's
        options stay in force.

        Raises:
            RlverError: there is no such checkpoint in `directory`.
        """
        with _quiet():
            path, _ = self._engine.load_checkpoint(directory, tag=self._tag)
        if path is None:
            raise RlverError(f"{self._tag}: no checkpoint of it in {directory}")
        # The checkpoint's learning rate and clip came along; whoever resumes with others means them.
        scheduler = self._engine.lr_scheduler
        scheduler.base_lrs = [self._options["lr"] for _ in scheduler.base_lrs]
        for group, factor in zip(self._engine.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group |= self._options | {
                "initial_lr": self._options["lr"],
                "lr": self._options["lr"] * factor(scheduler.last_epoch),
            }
        # Where ZeRO clips, the clip is a number in its optimizer and was restored with it.
        if self.zero_stage:
            self._engine.optimizer.clip_grad = self._grad_clip

    def free(self) -> None:
        """Let go of optimizer and hooks, which would keep a dropped engine alive; the engine is of no use
        afterwards."""
        self._engine.destroy()

    def close(self) -> None:
        """Free the engine and leave the process group."""
        self.free()
        torch.distributed.destroy_process_group()


def main() -> None:
    """Command line: build the op."""
    parser = argparse.ArgumentParser(description="Prepare DeepSpeed for CPU learners.")
    parser.add_argument(
        "--build-ops",
        action="store_true",
        required=True,
        help="compile the shared-memory op ahead of the first start",
    )
    parser.parse_args()
    build_ops()


if __name__ == "__main__":
    main()
