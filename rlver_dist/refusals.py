"""What a run cannot do without, looked for on this machine before anything is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlver_dist.choices import Device, SimulatorBackend
from rlver_dist.config import RunConfig
from rlver_dist.errors import ResourceError
from rlver_dist.models import resolve, weight_bytes, weight_shapes
from rlver_dist.simulator.endpoints import key_from_environment, parse_address
from rlver_dist.training_config import check_num_layers

GIB = 1024**3


def check_parts(config: RunConfig) -> None:
    """Refuse a run whose models or key are not there, or whose engines do not fit into this machine's memory.

    Raises:
        DataError: a model folder is not there.
        ConfigError: the model lacks layers that options name, the environment the endpoints' key, or an address is no address.
        ResourceError: the engines on CPUs need more memory than there is.
    """
    policy = resolve(config.model.path)
    check_layers(config, policy)
    simulator = config.simulator
    if config.uses_endpoints:
        key_from_environment(simulator.openai.api_key_env)
        for address in simulator.openai.addresses:
            parse_address(address)
    if simulator.backend is SimulatorBackend.vllm:
        users = resolve(simulator.engine.model, "simulator.engine.model")
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


def check_memory(config: RunConfig, policy: str, users: str, have: int) -> None:
    """Refuse engines on CPUs whose weights and caches alone are more than `have` bytes.

    Args:
        config: the run's configuration.
        policy: folder of the policy's model; a hub id counts as nothing, since its size is not known here.
        users: the same of the users' model.
        have: the machine's memory.

    Raises:
        ResourceError: says what is needed, what is there, and the way out.
    """
    engine, cluster = config.simulator.engine, config.cluster
    engines = ((policy, cluster.engines, cluster.kv_cache_gib), (users, engine.engines, engine.kv_cache_gib))
    need = sum(max(count, 1) * ((weight_bytes(folder) or 0) + cache_gib * GIB) for folder, count, cache_gib in engines)
    if need > have:
        raise ResourceError(
            f"simulator.engine.model={engine.model}: the engines of policy and users need {need / GIB:.1f} GiB of memory and this machine "
            f"has {have / GIB:.1f} GiB; use a smaller model or simulator.engine.kv_cache_gib, or simulator=embedded"
        )
