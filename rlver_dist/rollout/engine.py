"""`PolicyEngine`: one vLLM engine that samples the policy's replies and takes new weights while requests are
in flight."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlver_dist.bundled_models import resolve
from rlver_dist.config.cluster import GIB, ClusterConfig
from rlver_dist.config.enums import Device, Precision
from rlver_dist.config.model import ModelConfig
from rlver_dist.config.precision import resolve_precision
from rlver_dist.config.simulator import UserEngineConfig
from rlver_dist.errors import BoundaryError, GoneError, WeightSyncError, boundary
from rlver_dist.rollout.collector import FinishReason, GenerateRequest, Generation

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.distributed.weight_transfer.base import WeightTransferUpdatePayload
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_BLOCK_TOKENS = 32
"""Tokens of a key-value block on CPUs. A prefix is found in whole blocks only: with vLLM's 128 most of a
short history is computed anew at each turn (2 turns of 40 dialogues: 4,576 tokens found of 8,769, against
1,152)."""


@dataclass(kw_only=True, slots=True, frozen=True)
class EngineSettings:
    """What one engine is built from.

    Attributes:
        model_path: Hugging Face folder or hub id.
        dtype: format of weights and arithmetic.
        device: `cpu` or `gpu`, never `auto`.
        seed: of the engine; each request brings its own.
        max_context_tokens: longest prompt and reply together.
        stop_token_ids: end tokens besides the model's own, such as the chat template's.
        weight_transfer: `shared_file` or `nccl`; None for an engine whose weights never change.
        max_concurrent: requests in one batch.
        tensor_parallel: GPUs the engine spans.
        gpu_memory_fraction: share of each GPU's memory.
        kv_cache_gib: on CPUs: memory of the key-value cache, GiB.
        cpu_threads: on CPUs: threads of the engine, bound to no core.
        distributed_executor: vLLM's executor for several GPUs, such as `ray`; None lets vLLM choose.
    """

    model_path: str
    dtype: Precision
    device: Device
    seed: int
    max_context_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    weight_transfer: str | None = "shared_file"
    max_concurrent: int = 256
    tensor_parallel: int = 1
    gpu_memory_fraction: float = 0.85
    kv_cache_gib: float = 2
    cpu_threads: int = 1
    distributed_executor: str | None = None

    @classmethod
    def from_config(
        cls,
        model: ModelConfig | UserEngineConfig,
        resources: ClusterConfig | UserEngineConfig,
        *,
        device: Device,
        seed: int,
        max_concurrent: int,
        cpu_threads: int,
        stop_token_ids: tuple[int, ...] = (),
        weight_transfer: str | None = None,
    ) -> EngineSettings:
        """Settings of an engine as it is configured; what is no option of the engine's own is given beside.

        Args:
            model: what the engine serves.
            resources: GPUs and memory that it takes: `cluster` for the policy's, the users' engines' own.
            device: `cpu` or `gpu`, never `auto`.
            seed: of the engine.
            max_concurrent: requests in one batch.
            cpu_threads: on CPUs: threads of the engine.
            stop_token_ids: end tokens besides the model's own.
            weight_transfer: `shared_file` or `nccl`; None for an engine whose weights never change.

        Raises:
            DataError: the model's folder is not there.
        """
        if isinstance(model, ModelConfig):
            path = resolve(model.path)
        else:
            path = resolve(model.model, "simulator.engine.model")
        return cls(
            model_path=path,
            dtype=resolve_precision(model.dtype, on_cpu=device is Device.cpu),
            device=device,
            seed=seed,
            max_context_tokens=model.max_context_tokens,
            stop_token_ids=stop_token_ids,
            weight_transfer=weight_transfer,
            max_concurrent=max_concurrent,
            tensor_parallel=resources.tensor_parallel,
            gpu_memory_fraction=resources.gpu_memory_fraction,
            kv_cache_gib=resources.kv_cache_gib,
            cpu_threads=cpu_threads,
        )


def set_environment(settings: EngineSettings) -> None:
    """Set what vLLM reads from the process's environment at import; it has to be imported after."""
    variables = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.device is Device.cpu:
        # vLLM's "auto" binds one core and reserves the other of two, which halves the speed on a laptop.
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.cpu_threads)}
        # vLLM compiles one small function of its log-probs although the engine is eager: 8 s of the first
        # reply, for nothing.
        variables["TORCHDYNAMO_DISABLE"] = "1"
        # The engine's core computes by itself, without a worker process beside it (`engine_arguments`), which
        # vLLM allows on CPUs only with this. That process is there to give OpenMP its environment, and ours
        # has it.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(variables)


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """vLLM's own names for `settings`, with prefix caching."""
    arguments: dict[str, object] = {
        "model": settings.model_path,
        "dtype": settings.dtype.value,
        "seed": settings.seed,
        "max_model_len": settings.max_context_tokens,
        "max_num_seqs": settings.max_concurrent,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": settings.distributed_executor,
        "enable_prefix_caching": True,
        # The run's own console has the screen.
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if settings.weight_transfer is not None:
        arguments["weight_transfer_config"] = {"backend": settings.weight_transfer}
    if settings.device is Device.cpu:
        # vLLM rewinds a request's random generator after each chunk of its prompt but the last, and a CPU
        # generator cannot rewind: one chunked prompt with a seed ends the engine.
        return arguments | {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "distributed_executor_backend": "uni"
            if settings.tensor_parallel == 1
            else settings.distributed_executor,
            "block_size": CPU_BLOCK_TOKENS,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * GIB),
        }
    return arguments | {"gpu_memory_utilization": settings.gpu_memory_fraction}


async def final_output(
    llm: AsyncLLM, what: str, prompt_ids: Sequence[int], parameters: SamplingParams, request_id: str
) -> RequestOutput:
    """The last output of one request; `what` names the engine in errors. Cancelled, it has vLLM abort the
    request.

    Raises:
        GoneError: the engine's process died.
        BoundaryError: vLLM failed, or ended the request without an output.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    last: RequestOutput | None = None
    with boundary(what):
        try:
            # To the end, although one output is expected: vLLM aborts a request whose stream is left early.
            async for output in llm.generate({"prompt_token_ids": list(prompt_ids)}, parameters, request_id):
                last = output
        except EngineDeadError as error:
            raise GoneError(f"{what}: its process died") from error
    if last is None:
        raise BoundaryError(f"{what}: the request ended without an output")
    return last


class PolicyEngine:
    """Samples replies, scores token lists, and takes the learner's weights.

    A plain class over vLLM's `AsyncLLM`; all methods belong to the event loop in which `start` ran.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._llm: AsyncLLM | None = None
        self._counter = itertools.count()
        self._prompt_tokens = self._cached_tokens = self._reply_tokens = 0

    async def start(self, version: int = 0) -> None:
        """Load the model and label its weights `version`; 15 to 20 s on CPUs.

        Raises:
            BoundaryError: vLLM does not start.
        """
        set_environment(self._settings)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        # The log-probs of the distribution that is sampled from, temperature included, so that the importance
        # ratio is exact at any temperature. vLLM's default are those of the raw logits.
        arguments = {**engine_arguments(self._settings), "logprobs_mode": "processed_logprobs"}
        with boundary(f"vLLM engine for {self._settings.model_path}"):
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            await self._llm.update_weight_version(str(version))

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one reply from softmax(logits / temperature), neither top-p nor top-k; equal seeds give
        equal replies.

        Raises:
            GoneError: vLLM's process died.
            BoundaryError: vLLM failed, or ended the request otherwise than at an end token or the token
                limit.
        """
        output = await self._run(
            request.prompt_ids,
            f"{request.dialogue_id}/{request.turn_index}",
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            logprobs=0,
            stop_token_ids=self._settings.stop_token_ids,
        )
        reply = output.outputs[0]
        if reply.finish_reason not in ("stop", "length"):
            raise BoundaryError(f"vLLM engine: the request ended as {reply.finish_reason!r}")
        # Both were asked for: `logprobs=0`, and `update_weight_version` at the start.
        assert reply.logprobs is not None and reply.weight_versions
        self._prompt_tokens += len(request.prompt_ids)
        self._cached_tokens += output.num_cached_tokens or 0
        self._reply_tokens += len(reply.token_ids)
        finish_reason: FinishReason = "stop" if reply.finish_reason == "stop" else "length"
        # vLLM's type allows None for a token without a log-prob. Such a reply would have fewer log-probs than
        # tokens, which `to_samples` refuses.
        return Generation(
            token_ids=list(reply.token_ids),
            logprobs=[
                at[token].logprob
                for at, token in zip(reply.logprobs, reply.token_ids, strict=True)
                if at is not None
            ],
            finish_reason=finish_reason,
            # A reply in flight during a sync has tokens of two versions or more.
            policy_version=(int(reply.weight_versions[0].version), int(reply.weight_versions[-1].version)),
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs at temperature 1 of given tokens, each given all tokens before it.

        Args:
            token_ids: `[L]`.

        Returns:
            `[L - 1]` nats, of `token_ids[1:]`.
        """
        # vLLM has no request that samples nothing: one token is sampled and left out.
        output = await self._run(token_ids, "score", max_tokens=1, temperature=1.0, seed=0, prompt_logprobs=0)
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return [at[token].logprob for at, token in pairs if at is not None]

    async def pause(self) -> None:
        """Freeze requests in flight, drop their keys and values and the prefix cache; new requests wait."""
        await self._started.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Go on with frozen and waiting requests; their keys and values are computed again, by the present
        weights."""
        await self._started.resume_generation()

    async def update_from_file(self, path: str, version: int) -> None:
        """Take all weights from a safetensors file with Hugging Face names and label them `version`.

        Requests in flight are frozen meanwhile and go on under the new weights. After an error the engine
        stays paused, since its weights are neither the old nor the new ones; a later complete update heals
        it.

        Raises:
            WeightSyncError: the file cannot be read, or misses a layer's weights (a tied `lm_head.weight` has
                to be in it).
        """
        try:
            await self.pause()
            await self.start_update()
            await self.receive_update({"path": path})
            await self.finish_update(version)
        except Exception as error:
            raise WeightSyncError(
                f"weights {path}, version {version}: {type(error).__name__}: {error}"
            ) from error
        await self.resume()

    async def connect(self, init_info: dict[str, object]) -> None:
        """Join the learner's transfer group (`nccl`); returns when the group is complete."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._started.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_update(self) -> None:
        """First of the three steps of an update by the learner; the engine has to be paused."""
        await self._started.start_weight_update()

    async def receive_update(self, update_info: WeightTransferUpdatePayload) -> None:
        """Second step: receive all weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._started.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_update(self, version: int) -> None:
        """Third step: compute with the new weights, labelled `version`, from now on; no prefix of the old
        ones is reused."""
        await self._started.finish_weight_update(weight_version=str(version))
        await self._started.reset_prefix_cache()

    def stats(self) -> dict[str, int]:
        """Requests not finished now, and tokens since the start: of prompts, of prompts found in the prefix
        cache, of replies."""
        return {
            "unfinished": self._started.get_num_unfinished_requests(),
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "reply_tokens": self._reply_tokens,
        }

    def close(self) -> None:
        """End vLLM's processes; harmless when called again."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    async def _run(
        self,
        prompt_ids: Sequence[int],
        name: str,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> RequestOutput:
        """One request; `logprobs` and `prompt_logprobs` are vLLM's: 0 asks for those of the given tokens
        alone."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # The counter keeps ids unique where a failed request is sent again.
        request_id = f"{name}#{next(self._counter)}"
        parameters = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop_token_ids=list(stop_token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            # The whole distribution: the importance ratio is defined where every token can be sampled.
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await final_output(self._started, "vLLM engine", prompt_ids, parameters, request_id)

    @property
    def _started(self) -> AsyncLLM:
        if self._llm is None:
            raise RuntimeError("PolicyEngine is used before start() or after close()")
        return self._llm
