"""What a run cannot do without, looked for on this machine before anything is started."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from rlver_dist.choices import CriticTrunk, Device, Precision, SimulatorBackend
from rlver_dist.config import RunConfig
from rlver_dist.errors import ResourceError
from rlver_dist.models import resolve, weight_bytes, weight_shapes
from rlver_dist.simulator.endpoints import key_from_environment, parse_address
from rlver_dist.training_config import check_num_layers

GIB = 1024**3


def check_parts(config: RunConfig) -> None:
    """Refuse a run whose models or key are not there, or which does not fit into this machine's memory.

    Raises:
        DataError: a model folder is not there.
        ConfigError: the model lacks layers that options name, the environment the endpoints' key, or an address is no address.
        ResourceError: on CPUs it needs more memory than there is.
    """
    policy = resolve(config.model.path)
    check_layers(config, policy)
    simulator = config.simulator
    if config.uses_endpoints:
        key_from_environment(simulator.openai.api_key_env)
        for address in simulator.openai.addresses:
            parse_address(address)
    users = resolve(simulator.engine.model, "simulator.engine.model") if simulator.backend is SimulatorBackend.vllm else None
    if config.cluster.device is Device.cpu:
        check_memory(config, policy, users, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def check_layers(config: RunConfig, policy: str) -> None:
    """Refuse options that name layers which the policy's model does not have.

    Args:
        config: the run's configuration.
        policy: folder of the policy's model; a hub id passes, since the actors that load it look again.

    Raises:
        ConfigError: names the option and what there is.
    """
    folder = Path(policy)
    if not (folder / "config.json").is_file():
        return
    if config.has_critic:
        layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        check_num_layers(config.critic.num_layers, layers)
    if config.model.lora.rank > 0:
        # Weights of one dimension are norms.
        matrices = [name for name, shape in weight_shapes(folder).items() if name.endswith(".weight") and len(shape) == 2]
        config.model.lora.targets({name.split(".")[-2] for name in matrices if ".layers." in name})


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
    engine, cluster = config.simulator.engine, config.cluster
    need = {
        "engines": max(cluster.engines, 1) * (_weights(policy) + cluster.kv_cache_gib * GIB),
        "learners": _learner_bytes(config, policy),
    }
    if users is not None:
        need["users' engines"] = max(engine.engines, 1) * (_weights(users) + engine.kv_cache_gib * GIB)
    total = sum(need.values())
    if total > have:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in need.items())
        largest_is_users = max(need, key=lambda name: need[name]) == "users' engines"
        named = f"simulator.engine.model={engine.model}" if largest_is_users else f"model.path={config.model.path}"
        way_out = "simulator.engine.kv_cache_gib, or simulator=embedded" if largest_is_users else "cluster.kv_cache_gib, or GPUs"
        raise ResourceError(
            f"{named}: weights, optimizers and caches need {total / GIB:.1f} GiB of memory ({parts}) and this machine has "
            f"{have / GIB:.1f} GiB; use a smaller model or {way_out}"
        )


def _weights(folder: str) -> int:
    return weight_bytes(folder) or 0


def _learner_bytes(config: RunConfig, policy: str) -> int:
    """Of one copy of what each learner holds: weights, and for each parameter that learns its float32 copy, gradient and moments."""
    if not weight_bytes(policy):
        return 0
    parameters = sum(math.prod(shape) for shape in weight_shapes(Path(policy)).values())
    # A float32 model is its own float32 copy.
    optimizer = parameters * (12 if config.model.dtype is Precision.float32 else 16)
    replicas = 1 + (config.algorithm.kl_coef > 0) + config.has_critic
    trained = (config.model.lora.rank == 0) + (config.has_critic and config.critic.trunk is CriticTrunk.trained)
    return replicas * _weights(policy) + trained * optimizer
