"""Options of the simulated users: emotion rules, what answers for them, and where that runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlver_dist.config.enums import LlmCalls, Precision, Preset, ResponseFormat, SimulatorBackend
from rlver_dist.errors import ConfigError


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
        if not self.temperature >= 0:
            raise ConfigError(f"simulator.llm.temperature={self.temperature}: use 0 or more")
        if self.seed < 0:
            raise ConfigError(f"simulator.llm.seed={self.seed}: use 0 or more")
        if self.schema_retries < 0:
            raise ConfigError(f"simulator.llm.schema_retries={self.schema_retries}: use 0 or more")
        if self.max_appraisal_tokens < 16:
            raise ConfigError(
                f"simulator.llm.max_appraisal_tokens={self.max_appraisal_tokens}: use 16 or more"
            )
        if self.max_message_tokens < 16:
            raise ConfigError(f"simulator.llm.max_message_tokens={self.max_message_tokens}: use 16 or more")
        if self.max_reply_bytes < 1:
            raise ConfigError(f"simulator.llm.max_reply_bytes={self.max_reply_bytes}: use 1 or more")


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
        if not self.model:
            raise ConfigError("simulator.engine.model='': use a Hugging Face model folder or hub id")
        if self.engines < 0:
            raise ConfigError(f"simulator.engine.engines={self.engines}: use 0 or more")
        if self.tensor_parallel < 1:
            raise ConfigError(f"simulator.engine.tensor_parallel={self.tensor_parallel}: use 1 or more")
        if self.kv_cache_gib < 1:
            raise ConfigError(f"simulator.engine.kv_cache_gib={self.kv_cache_gib}: use 1 or more")
        if self.max_context_tokens < 512:
            raise ConfigError(
                f"simulator.engine.max_context_tokens={self.max_context_tokens}: use 512 or more"
            )
        for key in ("gpus_per_rank", "gpu_memory_fraction"):
            fraction = getattr(self, key)
            if not 0 < fraction <= 1:
                raise ConfigError(f"simulator.engine.{key}={fraction}: use a share above 0, up to 1")


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
        for key in ("timeout_s", "max_backoff_s"):
            seconds = getattr(self, key)
            if not seconds > 0:
                raise ConfigError(f"simulator.openai.{key}={seconds}: use a number above 0")
        for key in ("max_retries", "max_tokens_total", "max_cost"):
            limit = getattr(self, key)
            if not limit >= 0:
                raise ConfigError(f"simulator.openai.{key}={limit}: use 0 or more")
        if self.max_concurrent < 1:
            raise ConfigError(f"simulator.openai.max_concurrent={self.max_concurrent}: use 1 or more")
        if not self.requests_per_minute >= 0:
            raise ConfigError(
                f"simulator.openai.requests_per_minute={self.requests_per_minute}: use 0 or more"
            )
        for key in ("price_per_million_prompt", "price_per_million_cached", "price_per_million_completion"):
            price = getattr(self, key)
            if not price >= 0:
                raise ConfigError(f"simulator.openai.{key}={price}: use 0 or more")
        schemes = ("http://", "https://")
        if not self.addresses or not all(address.startswith(schemes) for address in self.addresses):
            raise ConfigError(
                f"simulator.openai.endpoints={self.endpoints}: use comma-separated addresses that begin with "
                f"http:// or https://"
            )
        # Without prices every call costs 0, and the limit would never be reached.
        has_price = self.price_per_million_prompt > 0 or self.price_per_million_completion > 0
        if self.max_cost != 0 and not has_price:
            raise ConfigError(
                f"simulator.openai.max_cost={self.max_cost}: set the prices "
                f"(simulator.openai.price_per_million_*) that it is counted with"
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
        for key, highest in {"start_emotion": 100, "acceptance": 1, "expressiveness": 1}.items():
            knob = getattr(self, key)
            if knob is not None and not 0 <= knob <= highest:
                raise ConfigError(f"simulator.{key}={knob}: use null or a value from 0 to {highest}")
        if self.max_change is not None and not 0 < self.max_change <= 100:
            raise ConfigError(
                f"simulator.max_change={self.max_change}: use null or a value above 0, up to 100"
            )
        if self.replicas < 1:
            raise ConfigError(f"simulator.replicas={self.replicas}: use 1 or more")
        if self.judges < 1:
            raise ConfigError(f"simulator.judges={self.judges}: use 1 or more")
        if self.judges > 1 and self.backend is SimulatorBackend.embedded:
            raise ConfigError(
                f"simulator.judges={self.judges}: use 1 with simulator=embedded, whose rules always agree"
            )
        if self.backend is SimulatorBackend.openai and not self.openai.model:
            raise ConfigError("simulator.openai.model='': set the model's name as the endpoint knows it")
        self._check_judges()
        # Each replica opens a client of its own for each model at the endpoints, and divides the limits.
        num_clients = self.replicas * (len(self.further_judges) + (self.backend is SimulatorBackend.openai))
        if self.openai.max_concurrent < num_clients:
            raise ConfigError(
                f"simulator.openai.max_concurrent={self.openai.max_concurrent}: use {num_clients} or more, "
                f"one a replica and model"
            )

    def _check_judges(self) -> None:
        num_further = self.judges - 1
        num_models = len(self.further_judges)
        if num_further == 0:
            if num_models > 0:
                raise ConfigError(
                    f"simulator.judge_models={self.judge_models}: set simulator.judges above 1 with it"
                )
            return
        # One call gives appraisal and reply together, so the reply would follow one judge, not the verdict.
        if self.llm.calls is not LlmCalls.two:
            raise ConfigError(
                f"simulator.llm.calls={self.llm.calls.value}: use two with simulator.judges above 1"
            )
        if not self.llm.temperature > 0 and num_models < num_further:
            raise ConfigError(
                f"simulator.llm.temperature={self.llm.temperature}: use a value above 0, or name "
                f"{num_further} models in simulator.judge_models: equal judges always agree"
            )

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
