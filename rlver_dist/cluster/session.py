"""Starting or joining Ray, and waiting for what a layout needs, with a word on what is being waited for."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group

from rlver_dist.cluster.layout import Layout
from rlver_dist.config.cluster import ClusterConfig
from rlver_dist.config.enums import Device
from rlver_dist.config.machine import available_cores
from rlver_dist.errors import BoundaryError, ResourceError, RlverError

PLACEMENT_TIMEOUT_S = 600
MAX_CAUSE = 400
"""Characters of a failure's one line."""
LOGS = "/tmp/ray/session_latest/logs"


@dataclass(kw_only=True, slots=True, frozen=True)
class Session:
    """A Ray cluster as this run sees it.

    Attributes:
        num_gpus: GPUs of all nodes.
        num_cpus: cores of all nodes.
        num_nodes: nodes that are alive.
        dashboard: address of the Ray dashboard; empty where there is none.
        token: what the dashboard and everybody who joins has to show; empty where this process did not choose
            it.
    """

    num_gpus: int
    num_cpus: int
    num_nodes: int
    dashboard: str
    token: str


def open_session(cluster: ClusterConfig) -> Session:
    """Join `cluster.address` or RAY_ADDRESS, else start Ray on this machine, behind a token and with its
    dashboard on loopback.

    Raises:
        ResourceError: Ray does not start, or the cluster cannot be joined.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    token = "" if address else _choose_token()
    try:
        if address:
            dashboard = ray.init(address=address, log_to_driver=False).dashboard_url
        else:
            dashboard = _start_ray(cluster)
        have = ray.cluster_resources()
        nodes = ray.nodes()
    except Exception as error:
        # Whatever Ray raises here, it is a plain exception with a text of its own for each of its processes.
        ray.shutdown()
        raise ResourceError(_not_started(address, error)) from error
    return Session(
        num_gpus=int(have.get("GPU", 0)),
        # Ray counts the machine's. Of a cluster that was joined, nobody knows what its processes may use.
        num_cpus=int(have.get("CPU", 1)) if address else available_cores(),
        num_nodes=sum(node["Alive"] for node in nodes),
        dashboard=dashboard or "",
        token=token,
    )


def _start_ray(cluster: ClusterConfig) -> str | None:
    """Start Ray on this machine; returns the dashboard's address, None where there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray makes its workers nice by 15: on a machine that does anything else, engine and learner would crawl.
    os.environ.setdefault("RAY_worker_niceness", "0")
    context = ray.init(
        address="local",  # never join a cluster that somebody else's run happens to have left its address of
        include_dashboard=cluster.dashboard,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        configure_logging=False,
    )
    return context.dashboard_url


def _not_started(address: str | None, error: Exception) -> str:
    said = textwrap.shorten(str(error).strip() or type(error).__name__, MAX_CAUSE)
    if address:
        return (
            f"cluster.address={address}: no Ray cluster can be joined there ({said}); start it, or unset "
            f"cluster.address and RAY_ADDRESS"
        )
    busy = f"load {os.getloadavg()[0]:.1f} on {available_cores()} cores"
    return (
        f"Ray did not start ({busy}): {said}; end what else runs on this machine and start again (Ray's "
        f"logs: {LOGS})"
    )


def _choose_token() -> str:
    """A token of its own for the cluster that this process is about to start; none where the environment has
    chosen how Ray authenticates.

    Ray listens on all of the machine's addresses, and whoever reaches it could run code. By itself it would
    leave a token in the user's home, for all clusters to come.
    """
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return ""
    # Ray says in a warning that it does what it does by default.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    return os.environ["RAY_AUTH_TOKEN"]


def close_session() -> None:
    """Leave the cluster; ends it where this process started it."""
    ray.shutdown()


def bundles(layout: Layout) -> list[dict[str, float]]:
    """One bundle a GPU worker: the workers of the policy's engines, engine by engine, of the users', the
    policy's ranks, the critic's."""
    gpus_by_worker = (
        [layout.policy.gpus_per_rank] * layout.policy.ranks
        + [layout.users.gpus_per_rank] * layout.users.ranks
        + [layout.gpus_per_learner_rank] * (layout.learner_ranks + layout.critic_ranks)
    )
    return [{"GPU": gpus, "CPU": 1.0} for gpus in gpus_by_worker]


async def reserve(layout: Layout, note: Callable[[str], None]) -> PlacementGroup | None:
    """Reserve every GPU of the layout at once; None on CPUs, where actors share the cores.

    Raises:
        ResourceError: Ray cannot place it in time; says what is needed and what is free.
    """
    if layout.device is Device.cpu:
        return None
    # Packed on as few nodes as will do: an engine's workers, and a learner's ranks, talk all the time.
    group = placement_group(bundles(layout), strategy="PACK")
    # Asked again and again rather than awaited once, so that whoever waits hears for what.
    ready = asyncio.ensure_future(asyncio.wrap_future(group.ready().future()))
    for waited in range(0, PLACEMENT_TIMEOUT_S, 10):
        done, _ = await asyncio.wait([ready], timeout=10)
        if done:
            return group
        free = ray.available_resources().get("GPU", 0)
        have = ray.cluster_resources().get("GPU", 0)
        note(f"waiting {waited + 10} s for {layout.num_gpus:g} GPUs: {free:g} of {have:g} free")
    raise ResourceError(
        f"Ray placed no {layout.num_gpus:g} GPUs within {PLACEMENT_TIMEOUT_S} s; see `ray status` for who "
        f"holds them"
    )


@contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Let an error that an actor raised on purpose surface as itself, and any other failure of Ray as one
    line."""
    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, RlverError):
            raise cause from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A traceback's first line says which actor, its last one what happened. Ray's own reports begin with
        # what happened.
        said = f"{lines[0]} ... {lines[-1]}" if isinstance(error, RayTaskError) else lines[0]
        raise BoundaryError(f"{textwrap.shorten(said, MAX_CAUSE)} (actors' logs: {LOGS})") from error
