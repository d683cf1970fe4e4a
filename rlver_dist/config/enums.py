"""The options of a run that are one of a few names; the modules beside this one say where each is used."""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    """Number format of the model's weights in the learner and the engines; `config/precision.py` decides
    `auto`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class AlgorithmName(str, Enum):
    """How advantages are made from rewards: against the group's other dialogues, or against a critic's
    values."""

    grpo = "grpo"
    ppo = "ppo"


class CriticTrunk(str, Enum):
    """What happens to the model under the critic's value head."""

    trained = "trained"
    frozen = "frozen"


class KLEstimator(str, Enum):
    """Estimator of KL(policy || reference) from sampled tokens (Schulman 2020, "Approximating KL
    divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class KLPlacement(str, Enum):
    """Where the KL term enters: as a loss term, or subtracted from the reward."""

    loss = "loss"
    reward = "reward"


class RewardPlacement(str, Enum):
    """When a dialogue is paid: all of it at its end, or turn by turn as the emotion changes."""

    end = "end"
    turns = "turns"


class EndReward(str, Enum):
    """What a dialogue is paid when the policy itself ended it."""

    emotion = "emotion"
    zero = "zero"


class Preset(str, Enum):
    """Named sets of emotion rules; see `simulator/presets.py`."""

    sage = "sage"
    rlver_vanilla = "rlver_vanilla"
    rlver_challenging = "rlver_challenging"


class SimulatorBackend(str, Enum):
    """What speaks for the simulated users."""

    embedded = "embedded"
    vllm = "vllm"
    openai = "openai"


class LlmCalls(str, Enum):
    """Calls of the chat model a turn: appraise and then reply, or both under one schema."""

    two = "two"
    one = "one"


class ResponseFormat(str, Enum):
    """How an endpoint is held to JSON."""

    json_schema = "json_schema"
    json_object = "json_object"


class SecondJudge(str, Enum):
    """Who appraises held-out dialogues once more."""

    lexical = "lexical"
    embedded = "embedded"
    openai = "openai"
    none = "none"


class Device(str, Enum):
    """What engines and learners compute on; `auto` is resolved from the GPUs that Ray sees."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class WandbMode(str, Enum):
    """`auto` is online where an API key is set, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
