"""`ChatEngine`: one vLLM engine that speaks for the simulated users, each answer held to its JSON schema
while it is sampled."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from rlver_dist.chat_client.protocol import ChatAnswer, ChatRequest
from rlver_dist.dialogue import Message, Role
from rlver_dist.errors import BoundaryError, ConfigError, boundary
from rlver_dist.rollout.engine import EngineSettings, engine_arguments, final_output, set_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

PROBE = (Message(role=Role.SYSTEM, text="You are Ann."), Message(role=Role.USER, text="How are you?"))
"""Rendered at the start, to see whether the template takes a system message."""


class ChatTemplate:
    """A tokenizer's chat template as token lists.

    What the messages say is encoded with `split_special_tokens`, so that a literal "<|im_end|>" in a policy's
    reply stays text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids `[P]` of `messages` and the generation prompt; equal first messages give equal first ids.

        Raises:
            BoundaryError: the template refuses the messages, or leaves one out.
        """
        # The template is rendered around texts that stand for the messages. These are encoded apart, so that
        # nothing in them is read as a special token of the template.
        sentinels = [f"sentinel{index}text" for index in range(len(messages))]
        turns = [
            {"role": message.role.value, "content": sentinel}
            for message, sentinel in zip(messages, sentinels, strict=True)
        ]
        with boundary("chat template"):
            rest = str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids: list[int] = []
        for message, sentinel in zip(messages, sentinels, strict=True):
            piece, found, rest = rest.partition(sentinel)
            if not found:
                raise BoundaryError(f"chat template: it drops or reorders the {message.role.value} message")
            ids += self._tokenizer.encode(piece, add_special_tokens=False)
            ids += self._tokenizer.encode(message.text, add_special_tokens=False, split_special_tokens=True)
        return [*ids, *self._tokenizer.encode(rest, add_special_tokens=False)]


class ChatEngine:
    """A chat model for `ChatRequest`s. A plain class over vLLM's `AsyncLLM`; all methods belong to the event
    loop of `start`.

    Equal requests get equal answers, up to the last digits of a batch's arithmetic, which depend on what else
    is in the batch.
    """

    def __init__(self, settings: EngineSettings, name: str) -> None:
        """`name` is what the configuration calls the model; answers carry it."""
        self._settings = settings
        self._name = name
        self._llm: AsyncLLM | None = None
        self._template: ChatTemplate | None = None
        self._counter = itertools.count()

    async def start(self) -> None:
        """Load the model; 15 to 20 s on CPUs.

        Raises:
            BoundaryError: vLLM does not start.
            ConfigError: the model's chat template knows no system messages.
        """
        set_environment(self._settings)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._settings)
        # Where the schema allows white space between fields, small models sample it until the token limit.
        arguments["structured_outputs_config"] = {"backend": "xgrammar", "disable_any_whitespace": True}
        with boundary(f"vLLM engine for {self._settings.model_path}"):
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            # vLLM's own type is a narrower protocol; what it returns for a Hugging Face folder is this.
            self._template = ChatTemplate(cast("PreTrainedTokenizerBase", self._llm.get_tokenizer()))
        try:
            self._template.render(PROBE)
        except BoundaryError as error:
            # What vLLM has started would outlive the failed start.
            self.close()
            raise ConfigError(
                f"simulator.engine.model={self._name}: {error}; use a model whose template knows system "
                f"messages"
            ) from error

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The model's answer, JSON by `request.schema` unless it is cut at `max_tokens`.

        Raises:
            GoneError: vLLM's process died.
            BoundaryError: the prompt is too long, vLLM failed, or it ended the request otherwise than at an
                end or the token limit.
        """
        assert self._template is not None, "start() comes first"
        started = time.perf_counter()
        prompt_ids = self._template.render(request.messages)
        longest = self._settings.max_context_tokens
        # vLLM refuses such a prompt as well, but names no option of this package.
        if len(prompt_ids) + request.max_tokens > longest:
            raise BoundaryError(
                f"{request.key}: a prompt of {len(prompt_ids)} and an answer of {request.max_tokens} tokens "
                f"are more than "
                f"simulator.engine.max_context_tokens={longest}"
            )
        output = await self._run(prompt_ids, request)
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise BoundaryError(f"{request.key}: vLLM ended the request as {answer.finish_reason!r}")
        return ChatAnswer(
            text=answer.text,
            prompt_tokens=len(prompt_ids),
            cached_tokens=output.num_cached_tokens or 0,
            completion_tokens=len(answer.token_ids),
            seconds=time.perf_counter() - started,
            retries=0,
            model=self._name,
        )

    def close(self) -> None:
        """End vLLM's processes; harmless when called again."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None

    async def _run(self, prompt_ids: list[int], request: ChatRequest) -> RequestOutput:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        assert self._llm is not None, "start() comes first"
        parameters = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            structured_outputs=StructuredOutputsParams(json=request.schema),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        what = f"{request.key}: vLLM engine of {self._name}"
        # The counter keeps ids unique where a request is asked again.
        return await final_output(
            self._llm, what, prompt_ids, parameters, f"{request.key}#{next(self._counter)}"
        )
