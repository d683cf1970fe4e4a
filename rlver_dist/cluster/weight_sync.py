"""Carrying the learner's weights to every engine, and proving that they arrived."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray
from ray.actor import ActorHandle

from rlver_dist.cluster.learners import PolicyGroup
from rlver_dist.cluster.leftovers import folder_prefix
from rlver_dist.cluster.pools import EnginePool
from rlver_dist.cluster.processes import SHARED_MEMORY, this_process
from rlver_dist.config.cluster import GIB
from rlver_dist.config.enums import Precision
from rlver_dist.errors import ResourceError
from rlver_dist.rollout.probe import compare_logprobs
from rlver_dist.tracking.metrics import Metric, Reduction

SPARE_BYTES = GIB
"""Shared memory that is left to others, Ray's object store above all, beside the weights."""


def find_weight_dir(need: int) -> Path:
    """Where a file of `need` bytes fits: shared memory, of which containers often get 64 MB alone, else the
    temporary folder.

    Raises:
        ResourceError: neither has room; says what is needed and what is free.
    """
    temporary = Path(tempfile.gettempdir())
    # Memory first: a disk would be written and read again at every sync.
    rooms = {
        folder: shutil.disk_usage(folder).free for folder in (SHARED_MEMORY, temporary) if folder.is_dir()
    }
    if rooms.get(SHARED_MEMORY, 0) >= need + SPARE_BYTES:
        return SHARED_MEMORY
    if rooms[temporary] >= need:
        return temporary
    free = " and ".join(f"{room / GIB:.1f} GiB free in {folder}" for folder, room in rooms.items())
    raise ResourceError(
        f"the weights travel to the engines in a file of {need / GIB:.1f} GiB, and there are {free}; give "
        f"the container more shared memory "
        f"(docker run --shm-size; {SPARE_BYTES / GIB:g} GiB stay free), or set TMPDIR to a folder with room"
    )


class RemoteEngines:
    """The rollout engines as a learner calls them to drive a transfer over NCCL (`TransferTargets`).

    It travels to the learner's process with the actors' handles in it: the learner itself knows nothing of
    Ray. Every call blocks until all engines have answered, since the learner's side is no coroutine.
    """

    def __init__(self, engines: Sequence[ActorHandle], workers_per_engine: int) -> None:
        self._engines = list(engines)
        self.workers_per_engine = (workers_per_engine,) * len(self._engines)

    def connect(self, init_infos: Sequence[dict[str, object]]) -> None:
        """Let each engine join the transfer group with its own of `init_infos`."""
        pairs = zip(self._engines, init_infos, strict=True)
        ray.get([engine.connect.remote(init_info) for engine, init_info in pairs])

    def start_update(self) -> None:
        """Make all engines ready to receive."""
        ray.get([engine.start_update.remote() for engine in self._engines])

    def receive_update(self, update_info: object) -> None:
        """Let all engines receive all weights; `update_info` is vLLM's own payload, passed on as it is."""
        ray.get([engine.receive_update.remote(update_info) for engine in self._engines])

    def finish_update(self, version: int) -> None:
        """Let all engines compute with the new weights, labelled `version`."""
        ray.get([engine.finish_update.remote(version) for engine in self._engines])


class WeightSync:
    """One call a policy version. Engines stay paused while weights travel; replies in flight go on under the
    new ones.

    After each sync the log-probs of a fixed prompt are compared between the learner and every engine.
    """

    def __init__(
        self,
        learner: PolicyGroup,
        engines: EnginePool,
        *,
        backend: str,
        workers_per_engine: int,
        dtype: Precision,
        probe: list[int],
    ) -> None:
        """`backend` is `shared_file` or `nccl`; `probe` is the fixed prompt's token ids."""
        self._learner = learner
        self._engines = engines
        self._backend = backend
        self._workers_per_engine = workers_per_engine
        self._dtype = dtype
        self._probe = probe
        self._folder: Path | None = None

    async def open(self) -> None:
        """Prepare the way: a folder in shared memory, or the NCCL group.

        Raises:
            ResourceError: no folder has room for the weights.
        """
        if self._backend == "nccl":
            engines = RemoteEngines(self._engines.engines, self._workers_per_engine)
            await self._learner.connect_engines(engines)
        else:
            base = find_weight_dir(await self._learner.weight_bytes())
            self._folder = Path(tempfile.mkdtemp(prefix=folder_prefix(this_process()), dir=base))

    def close(self) -> None:
        """Remove what `open` made."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def __call__(self, version: int) -> list[Metric]:
        """Bring every engine to the learner's weights, labelled `version`.

        Raises:
            WeightSyncError: weights did not arrive.
            WeightMismatchError: an engine does not compute what the learner computes.
        """
        if self._backend == "nccl":
            await self._broadcast(version)
        else:
            await self._by_file(version)
        # The prefix caches are of the old weights and gone, so no dialogue has a reason to stay where it was.
        self._engines.forget_homes()
        return await self._compare(version)

    async def _by_file(self, version: int) -> None:
        assert self._folder is not None, "open() comes first"
        path = self._folder / "weights.safetensors"
        await self._learner.write_weights(path)
        await asyncio.gather(
            *(engine.update_from_file.remote(str(path), version) for engine in self._engines.engines)
        )
        # Every engine has read it; until the next sync the memory is better used by others.
        path.unlink()

    async def _broadcast(self, version: int) -> None:
        # Replies in flight wait and go on under the new weights: none has to be sampled again.
        await asyncio.gather(*(engine.pause.remote() for engine in self._engines.engines))
        await self._learner.send_weights(version)
        await asyncio.gather(*(engine.resume.remote() for engine in self._engines.engines))

    async def _compare(self, version: int) -> list[Metric]:
        # The engines' numbers are their own kernels', so they are compared within what the format rounds.
        ours, theirs = await asyncio.gather(
            self._learner.probe(self._probe), self._engines.score(self._probe)
        )
        results = [
            compare_logprobs(ours, logprobs, self._dtype, engine_index=index, step=version)
            for index, logprobs in enumerate(theirs)
        ]
        return [
            Metric("sync/probe_mean_abs", max(result.mean_abs for result in results), Reduction.max),
            Metric("sync/probe_max_abs", max(result.max_abs for result in results), Reduction.max),
        ]
