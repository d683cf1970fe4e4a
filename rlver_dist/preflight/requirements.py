"""What a run cannot do without, looked for on this machine before anything is started."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from rlver_dist.bundled_models import resolve, weight_shapes
from rlver_dist.chat_client.endpoints import key_from_environment, parse_address
from rlver_dist.config.cluster import GIB
from rlver_dist.config.enums import CriticTrunk, Device, Precision, SimulatorBackend
from rlver_dist.config.learner import CriticConfig, check_num_layers
from rlver_dist.config.model import LoraConfig, ModelConfig
from rlver_dist.config.run import RunConfig
from rlver_dist.errors import ResourceError

BYTES = {Precision.float32: 4, Precision.bfloat16: 2}
"""Bytes a number."""


def check_requirements(config: RunConfig) -> None:
    """Refuse a run whose models or key are not there, or which does not fit into this machine's memory.

    Raises:
        DataError: a model folder is not there.
        ConfigError: the model lacks layers that options name, the environment the endpoints' key, or an
            address is no address.
        ResourceError: on CPUs it needs more memory than there is.
    """
    policy = resolve(config.model.path)
    critic = config.critic if config.has_critic else None
    check_layers(policy, config.model.lora, critic)
    simulator = config.simulator
    if config.uses_endpoints:
        key_from_environment(simulator.openai.api_key_env)
        for address in simulator.openai.addresses:
            parse_address(address)
    users = (
        resolve(simulator.engine.model, "simulator.engine.model")
        if simulator.backend is SimulatorBackend.vllm
        else None
    )
    # A cluster's nodes have memory of their own, which nobody can see from here.
    here = not (config.cluster.address or os.environ.get("RAY_ADDRESS"))
    if config.cluster.device is Device.cpu and here:
        check_memory(config, policy, users, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_layers(policy: str, lora: LoraConfig, critic: CriticConfig | None) -> None:
    """Refuse options that name layers which the policy's model does not have.

    Args:
        policy: folder of the policy's model; a hub id passes, since the actors that load it look again.
        lora: adapters, and the layers that they go to.
        critic: None where the algorithm has none.

    Raises:
        ConfigError: names the option and what there is.
    """
    folder = Path(policy)
    # Files of a hub are not here before the actors have loaded them.
    if not (folder / "config.json").is_file():
        return
    if critic is not None:
        layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        check_num_layers(critic.num_layers, layers)
    if lora.rank > 0:
        # Weights of one dimension are norms.
        matrices = [
            name
            for name, shape in weight_shapes(folder).items()
            if name.endswith(".weight") and len(shape) == 2
        ]
        lora.targets({name.split(".")[-2] for name in matrices if ".layers." in name})


def check_memory(config: RunConfig, policy: str, users: str | None, have: int) -> None:
    """Refuse a run on CPUs whose weights, optimizers and caches alone are more than `have` bytes.

    Args:
        config: the run's configuration.
        policy: folder of the policy's model; a hub id counts as nothing, since its size is not known here.
        users: the same of the users' model; None without one.
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
    if users is not None:
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


def _numbers(folder: str, layers: int = 0) -> int:
    """Numbers in a local model's weights, or in those of its first `layers` layers and without a head; 0 for
    a hub id."""
    shapes = weight_shapes(Path(folder))
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
    policy: str, model: ModelConfig, critic: CriticConfig | None, *, has_reference: bool
) -> int:
    """Of one copy of what each learner holds: weights, and for each number that learns its float32 copy,
    gradient and moments."""
    size = BYTES[model.dtype]
    # Gradient and two moments, 4 bytes each; and a float32 copy, which a float32 model is itself.
    learned = 12 if size == 4 else 16
    numbers = _numbers(policy)
    # Adapters are too small to count.
    need = (1 + has_reference) * numbers * size + (learned * numbers if model.lora.rank == 0 else 0)
    if critic is not None:
        values = _numbers(policy, critic.num_layers)
        need += values * size + (learned * values if critic.trunk is CriticTrunk.trained else 0)
    return need
