"""What a run cannot do without, looked for on this machine before anything is started."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from rlver_dist.bundled_models import resolve
from rlver_dist.chat_client.endpoints import key_from_environment, parse_address
from rlver_dist.config.cluster import GIB
from rlver_dist.config.enums import CriticTrunk, Device, Precision, SimulatorBackend
from rlver_dist.config.learner import CriticConfig, check_num_layers
from rlver_dist.config.machine import available_memory
from rlver_dist.config.model import LoraConfig, ModelConfig
from rlver_dist.config.rollout import RolloutConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.data.persona import Persona
from rlver_dist.errors import ConfigError, ResourceError
from rlver_dist.preflight.chat_template import check_template, prompt_tokens
from rlver_dist.preflight.folders import check_output_dir, check_resume
from rlver_dist.preflight.hub import hub_folder
from rlver_dist.preflight.model_folder import ModelFolder, has_all_weights, read_folder
from rlver_dist.rollout.renderer import system_prompt

BYTES = {Precision.float32: 4, Precision.bfloat16: 2}
"""Bytes a number."""
OPENINGS_TRIED = 20
"""Shortest openings by characters, among which the one of fewest tokens is looked for."""


def check_requirements(config: RunConfig, train: Sequence[Persona], *, fetch: bool) -> list[str]:
    """Refuse a run whose models, key or folders are not there or not usable, or which does not fit into this
    machine's memory.

    Args:
        config: the run's configuration.
        train: the training users.
        fetch: ask the hub for models that its cache lacks; without, they are left unchecked.

    Returns:
        What the user may want to know, a line each; warnings begin with "warning".

    Raises:
        DataError: a model or a checkpoint is not there, or a file of it is broken.
        ConfigError: a model cannot be trained or asked as the options say, the environment lacks the
            endpoints' key, or an address is no address.
        ResourceError: the output folder cannot be written, or there is too little disk or, on CPUs, memory.
    """
    check_resume(config.resume)
    notices: list[str] = []
    critic = config.critic if config.has_critic else None
    policy = _find_model(config.model.path, "model.path", notices, fetch=fetch)
    if policy is not None:
        notices += _check_policy(policy, config.model, config.rollout)
        _check_room(policy, config.model, config.rollout, train)
        check_layers(policy, config.model.lora, critic)
    simulator = config.simulator
    if config.uses_endpoints:
        key_from_environment(simulator.openai.api_key_env)
        for address in simulator.openai.addresses:
            parse_address(address)
    users = None
    if simulator.backend is SimulatorBackend.vllm:
        users = _find_model(simulator.engine.model, "simulator.engine.model", notices, fetch=fetch)
        if users is not None:
            users.check_context("simulator.engine.max_context_tokens", simulator.engine.max_context_tokens)
            notices += check_template(users.path, users.where, system=True, policy=False)
    # A cluster's nodes have memory of their own, which nobody can see from here.
    here = not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if config.cluster.device is Device.cpu and here:
        check_memory(config, policy, users, available_memory())
    saves = math.ceil(config.num_iterations / config.save_every) if config.save_every else 1
    checkpoints = min(config.keep_checkpoints + 1, saves)
    kept = 0 if policy is None else _kept_bytes(policy, config.model, critic, checkpoints)
    check_output_dir(config.output_dir, kept, config.keep_checkpoints)
    return notices


def _find_model(path: str, key: str, notices: list[str], *, fetch: bool) -> ModelFolder | None:
    """The folder of a model; None, and a notice, where it would have to be fetched first."""
    where = f"{key}={path}"
    folder = Path(resolve(path, key))
    if folder.is_dir():
        return read_folder(folder, where)
    fetched = hub_folder(path, where, fetch=fetch)
    if fetched is None:
        notices.append(f"{where}: not on this machine, so not looked at; a start fetches it from the hub")
        return None
    return read_folder(fetched, where, weights=has_all_weights(fetched))


def _check_policy(policy: ModelFolder, model: ModelConfig, rollout: RolloutConfig) -> list[str]:
    policy.check_context("model.max_context_tokens", model.max_context_tokens)
    policy.check_trainable(model.max_context_tokens)
    # With thinking, the base model is also asked without the instruction to think.
    prompts = [system_prompt(model, think) for think in {rollout.think, False}]
    without = "" if rollout.think else "send none: model.system_prompt=''"
    return check_template(policy.path, policy.where, system=any(prompts), policy=True, without_system=without)


def _check_room(
    policy: ModelFolder, model: ModelConfig, rollout: RolloutConfig, train: Sequence[Persona]
) -> None:
    """Refuse a context in which not even the shortest first prompt leaves room for a reply: every dialogue
    would end before its first turn, and nothing would ever be trained."""
    openings = sorted({persona.opening for persona in train}, key=len)[:OPENINGS_TRIED]
    prompt = prompt_tokens(policy.path, system_prompt(model, rollout.think), openings)
    if prompt is not None and prompt + rollout.max_turn_tokens > model.max_context_tokens:
        raise ConfigError(
            f"model.max_context_tokens={model.max_context_tokens}: the system message and the shortest "
            f"opening take {prompt} tokens and a reply up to {rollout.max_turn_tokens}, so no dialogue would "
            f"have a turn; use {prompt + rollout.max_turn_tokens} or more"
        )


def check_layers(policy: ModelFolder, lora: LoraConfig, critic: CriticConfig | None) -> None:
    """Refuse options that name layers which the policy's model does not have.

    Args:
        policy: the model.
        lora: adapters, and the layers that they go to.
        critic: None where the algorithm has none.

    Raises:
        ConfigError: names the option and what there is.
    """
    if critic is not None:
        check_num_layers(critic.num_layers, policy.num_layers)
    if lora.rank > 0 and policy.shapes:
        # Weights of one dimension are norms.
        matrices = [
            name for name, shape in policy.shapes.items() if name.endswith(".weight") and len(shape) == 2
        ]
        lora.targets({name.split(".")[-2] for name in matrices if ".layers." in name})


def _optimizer_bytes(dtype: Precision) -> int:
    """Of each number that learns: two float32 moments, and a float32 copy unless the model is one."""
    return 8 if dtype is Precision.float32 else 12


def _kept_bytes(
    policy: ModelFolder, model: ModelConfig, critic: CriticConfig | None, checkpoints: int
) -> int:
    """Of so many checkpoints and the exported policy: every weight, and for each number that learns a float32
    copy and two moments."""
    size = BYTES[model.dtype]
    learned = _optimizer_bytes(model.dtype)
    numbers = _numbers(policy)
    need = numbers * size + (0 if model.lora.rank > 0 else numbers * learned)
    if critic is not None and critic.trunk is CriticTrunk.trained:
        need += _numbers(policy, critic.num_layers) * (size + learned)
    return checkpoints * need + numbers * size


def check_memory(config: RunConfig, policy: ModelFolder | None, users: ModelFolder | None, have: int) -> None:
    """Refuse a run on CPUs whose weights, optimizers and caches alone are more than `have` bytes.

    Args:
        config: the run's configuration.
        policy: the policy's model; None counts as nothing, since its size is not known here.
        users: the same of the users' model.
        have: the machine's memory.

    Raises:
        ResourceError: says what is needed, what is there, and the way out.
    """
    engine = config.simulator.engine
    cluster = config.cluster
    size = BYTES[config.model.dtype]
    need = {
        "engines": max(cluster.engines, 1) * (_numbers(policy) * size + cluster.kv_cache_gib * GIB),
        "learners": _learner_bytes(
            policy,
            config.model,
            config.critic if config.has_critic else None,
            has_reference=config.algorithm.kl_coef > 0,
        ),
    }
    if config.simulator.backend is SimulatorBackend.vllm:
        need["users' engines"] = max(engine.engines, 1) * (
            _numbers(users) * BYTES[engine.dtype] + engine.kv_cache_gib * GIB
        )
    # Activations and object store come on top: what does not even fit without them never runs.
    total = sum(need.values())
    # Whoever takes most is where a smaller choice helps most.
    largest = max(need, key=lambda name: need[name])
    if total > have:
        needs = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items())
        key, value, way_out = {
            "engines": ("model.path", config.model.path, "cluster.kv_cache_gib"),
            "learners": ("model.path", config.model.path, "model.lora.rank, or critic.trunk=frozen"),
            "users' engines": (
                "simulator.engine.model",
                engine.model,
                "simulator.engine.kv_cache_gib, or simulator=embedded",
            ),
        }[largest]
        raise ResourceError(
            f"{key}={value}: weights, optimizers and caches need {total / GIB:.1f} GiB of memory ({needs}) "
            f"and this machine has "
            f"{have / GIB:.1f} GiB; use a smaller model or {way_out}"
        )


def _numbers(model: ModelFolder | None, layers: int = 0) -> int:
    """Numbers in a model's weights, or in those of its first `layers` layers and without a head; 0 where they
    are not here."""
    shapes = {} if model is None else model.shapes
    if layers:
        # A critic has a value head of a few numbers in place of the language model's.
        left_out = [
            name
            for name in shapes
            if name == "lm_head.weight" or (".layers." in name and _layer(name) >= layers)
        ]
        shapes = {name: shape for name, shape in shapes.items() if name not in left_out}
    return sum(math.prod(shape) for shape in shapes.values())


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _learner_bytes(
    policy: ModelFolder | None, model: ModelConfig, critic: CriticConfig | None, *, has_reference: bool
) -> int:
    """Of one copy of what each learner holds: weights, and for each number that learns its float32 copy,
    gradient and moments."""
    size = BYTES[model.dtype]
    learned = 4 + _optimizer_bytes(model.dtype)  # 4 for the gradient
    numbers = _numbers(policy)
    # Adapters are too small to count.
    need = (1 + has_reference) * numbers * size + (learned * numbers if model.lora.rank == 0 else 0)
    if critic is not None:
        values = _numbers(policy, critic.num_layers)
        need += values * size + (learned * values if critic.trunk is CriticTrunk.trained else 0)
    return need
