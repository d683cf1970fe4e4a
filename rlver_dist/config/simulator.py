"""Options of the simulated users: emotion rules, what answers for them, and where that runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlver_dist.config.checks import at_least, positive, require
from rlver_dist.config.enums import LlmCalls, Precision, Preset, ResponseFormat, SimulatorBackend


@dataclass(kw_only=True, slots=True)
class LlmUserConfig:
    """Users spoken for by a chat model (backends `vllm` and `openai`)."""

    calls: LlmCalls = LlmCalls.two
    """Calls a turn: `two` appraises first and then replies, as SAGE; `one` does both under one schema."""
    temperature: float = 0.0
    """Sampling temperature of the users; 0 takes the likeliest token."""
    seed: int = 0
    """Seeds the users' sampling, with the dialogue's own seed."""
    max_appraisal_tokens: int = 400
    """Tokens of an appraisal, JSON included."""
    max_message_tokens: int = 300
    """Tokens of a reply to the policy, JSON and the thoughts before it included."""
    max_reply_bytes: int = 4000
    """UTF-8 bytes of a policy's reply that a prompt shows, since a token is one byte or more; the rest is cut
    off."""
    schema_retries: int = 2
    """Times that an answer outside its schema is asked for again, with another seed, before the dialogue
    fails."""

    def __post_init__(self) -> None:
        at_least(
            0,
            "simulator.llm.",
            temperature=self.temperature,
            seed=self.seed,
            schema_retries=self.schema_retries,
        )
        at_least(
            16,
            "simulator.llm.",
            max_appraisal_tokens=self.max_appraisal_tokens,
            max_message_tokens=self.max_message_tokens,
        )
        at_least(1, "simulator.llm.", max_reply_bytes=self.max_reply_bytes)


@dataclass(kw_only=True, slots=True)
class UserEngineConfig:
    """The vLLM engines that speak for the users (backend `vllm`)."""

    model: str = "Qwen/Qwen2.5-14B-Instruct"
    """Hugging Face model folder or hub id, or the name of a bundled model (`smollm2-135m-instruct`)."""
    dtype: Precision = Precision.auto
    """Number format of the weights; `auto` as in `model.dtype`."""
    max_context_tokens: int = 16384
    """Longest prompt and answer together, in tokens."""
    engines: int = 0
    """Engines; 0 derives them: a quarter of the GPUs where `cluster` derives its own, else one. Where
    `cluster` derives and there is a single GPU, its shares are derived as well, and this and the next three
    are not used."""
    tensor_parallel: int = 1
    """GPUs an engine."""
    gpus_per_rank: float = 1.0
    """GPUs that Ray reserves for each engine worker; below 1 lets it share a GPU with the policy. Above 0.5
    with tensor_parallel above 1, since NCCL connects no two workers on one GPU."""
    gpu_memory_fraction: float = 0.85
    """Share of a GPU's memory that an engine takes."""
    kv_cache_gib: int = 1
    """On CPUs: memory of an engine's key-value cache, GiB."""

    def __post_init__(self) -> None:
        require(
            bool(self.model),
            "simulator.engine.model",
            repr(self.model),
            "use a Hugging Face model folder or hub id",
        )
        at_least(0, "simulator.engine.", engines=self.engines)
        at_least(1, "simulator.engine.", tensor_parallel=self.tensor_parallel, kv_cache_gib=self.kv_cache_gib)
        at_least(512, "simulator.engine.", max_context_tokens=self.max_context_tokens)
        for key in ("gpus_per_rank", "gpu_memory_fraction"):
            require(
                0 < getattr(self, key) <= 1,
                f"simulator.engine.{key}",
                getattr(self, key),
                "use a share above 0, up to 1",
            )


@dataclass(kw_only=True, slots=True)
class HttpChatConfig:
    """OpenAI-compatible endpoints that speak for the users (backend `openai`)."""

    endpoints: str = "https://api.openai.com/v1"
    """Base addresses, comma-separated; a call goes to the first that works."""
    model: str = ""
    """Model name as the endpoint knows it; has to be set."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; empty where the endpoint needs none."""
    timeout_s: float = 60.0
    """Seconds until one attempt counts as failed."""
    max_retries: int = 5
    """Further attempts after a failed one."""
    max_backoff_s: float = 30.0
    """Longest wait between two attempts, seconds."""
    max_concurrent: int = 64
    """Calls in flight, over all replicas of the reward service."""
    requests_per_minute: float = 0.0
    """Calls started a minute, over all replicas; 0 sets no limit."""
    max_tokens_total: int = 0
    """Prompt and completion tokens since the run's start or resume, after which it stops with a checkpoint; 0
    sets no limit."""
    max_cost: float = 0.0
    """The same in money, in the prices' currency."""
    price_per_million_prompt: float = 0.0
    """Price of a million prompt tokens that were not cached."""
    price_per_million_cached: float = 0.0
    """Price of a million prompt tokens from the endpoint's cache; 0 takes the price of other prompt
    tokens."""
    price_per_million_completion: float = 0.0
    """Price of a million sampled tokens."""
    response_format: ResponseFormat = ResponseFormat.json_schema
    """How the endpoint is held to JSON; `json_object` for those that know no schemas."""

    def __post_init__(self) -> None:
        prefix = "simulator.openai."
        positive(prefix, timeout_s=self.timeout_s, max_backoff_s=self.max_backoff_s)
        at_least(
            0,
            prefix,
            max_retries=self.max_retries,
            max_tokens_total=self.max_tokens_total,
            max_cost=self.max_cost,
        )
        at_least(1, prefix, max_concurrent=self.max_concurrent)
        at_least(0, prefix, requests_per_minute=self.requests_per_minute)
        prices = ("price_per_million_prompt", "price_per_million_cached", "price_per_million_completion")
        at_least(0, prefix, **{price: getattr(self, price) for price in prices})
        addresses = self.addresses
        whole = bool(addresses) and all(address.startswith(("http://", "https://")) for address in addresses)
        require(
            whole,
            f"{prefix}endpoints",
            self.endpoints,
            "use comma-separated addresses that begin with http:// or https://",
        )
        priced = (
            self.max_cost == 0 or self.price_per_million_prompt > 0 or self.price_per_million_completion > 0
        )
        require(
            priced,
            f"{prefix}max_cost",
            self.max_cost,
            "set the prices (simulator.openai.price_per_million_*) that it is counted with",
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """The base addresses, in order."""
        return tuple(address.strip() for address in self.endpoints.split(",") if address.strip())


@dataclass(kw_only=True, slots=True)
class SimulatorConfig:
    """The simulated users and the reward service in front of them."""

    backend: SimulatorBackend = SimulatorBackend.embedded
    """What speaks for the users: rules on sentence embeddings, own vLLM engines, or an OpenAI-compatible
    endpoint."""
    preset: Preset = Preset.rlver_vanilla
    """Emotion rules in training; evaluation always uses `sage`."""
    start_emotion: float | None = None
    """Emotion at the opening in points; null takes the preset's."""
    max_change: float | None = None
    """Largest change a turn in points, either way; null takes the preset's."""
    acceptance: float | None = None
    """Difficulty, 0 to 1: share of a reply's merit that the user lets count; null takes the preset's."""
    expressiveness: float | None = None
    """Difficulty, 0 to 1: how readily user messages show feelings and needs; null takes the preset's."""
    replicas: int = 1
    """Reward service actors."""
    judges: int = 1
    """Appraisals of each reply, of which the median counts; above 1 only with `vllm` and `openai`, in two
    calls a turn."""
    judge_models: str = ""
    """Models of the judges after the first, comma-separated, at simulator.openai.endpoints; fewer than judges
    take turns. Empty takes the users' own model with other seeds, which differ only at a temperature above
    0."""
    llm: LlmUserConfig = field(default_factory=LlmUserConfig)
    engine: UserEngineConfig = field(default_factory=UserEngineConfig)
    openai: HttpChatConfig = field(default_factory=HttpChatConfig)

    def __post_init__(self) -> None:
        for key, top in {"start_emotion": 100, "acceptance": 1, "expressiveness": 1}.items():
            value = getattr(self, key)
            require(
                value is None or 0 <= value <= top,
                f"simulator.{key}",
                value,
                f"use null or a value from 0 to {top}",
            )
        change = self.max_change
        require(
            change is None or 0 < change <= 100,
            "simulator.max_change",
            change,
            "use null or a value above 0, up to 100",
        )
        at_least(1, "simulator.", replicas=self.replicas, judges=self.judges)
        alone = self.backend is not SimulatorBackend.embedded or self.judges == 1
        require(
            alone, "simulator.judges", self.judges, "use 1 with simulator=embedded, whose rules always agree"
        )
        named = self.backend is not SimulatorBackend.openai or bool(self.openai.model)
        require(
            named,
            "simulator.openai.model",
            repr(self.openai.model),
            "set the model's name as the endpoint knows it",
        )
        self._check_judges()
        sharing = self.replicas * (len(self.further_judges) + (self.backend is SimulatorBackend.openai))
        enough = self.openai.max_concurrent >= sharing
        require(
            enough,
            "simulator.openai.max_concurrent",
            self.openai.max_concurrent,
            f"use {sharing} or more, one a replica and model",
        )

    def _check_judges(self) -> None:
        further, models = self.judges - 1, len(self.further_judges)
        require(
            further > 0 or models == 0,
            "simulator.judge_models",
            self.judge_models,
            "set simulator.judges above 1 with it",
        )
        if further > 0:
            two_calls = self.llm.calls is LlmCalls.two
            require(
                two_calls,
                "simulator.llm.calls",
                self.llm.calls.value,
                "use two with simulator.judges above 1",
            )
            vary = self.llm.temperature > 0 or models >= further
            way_out = (
                f"use a value above 0, or name {further} models in simulator.judge_models: equal judges "
                f"always agree"
            )
            require(vary, "simulator.llm.temperature", self.llm.temperature, way_out)

    @property
    def further_judges(self) -> tuple[str, ...]:
        """`judge_models`, in order."""
        return tuple(name.strip() for name in self.judge_models.split(",") if name.strip())

    def for_evaluation(self) -> SimulatorConfig:
        """The same backend under SAGE's rules, whatever the training users' rules are."""
        return replace(
            self,
            preset=Preset.sage,
            start_emotion=None,
            max_change=None,
            acceptance=None,
            expressiveness=None,
        )

    @property
    def uses_engines(self) -> bool:
        """Whether the users need vLLM engines of their own."""
        return self.backend is SimulatorBackend.vllm
