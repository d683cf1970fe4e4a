"""The number format that a run's models take, by the processor that computes them; the one place that looks
at its instructions."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from rlver_dist.config.enums import Device, Precision, SimulatorBackend
from rlver_dist.config.run import RunConfig
from rlver_dist.errors import ConfigError

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
"""Instructions that multiply bfloat16 matrices; AVX2 alone computes them 5 to 12 times slower than float32
(docs/troubleshooting.md)."""
OVERRIDE = "RLVER_DIST_CPU_BFLOAT16"
"""Environment variable, `0` or `1`: take the CPU for one without, or with, bfloat16 instructions, whatever it
says of itself."""


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has bfloat16 instructions, by Linux's list of its flags.

    Raises:
        ConfigError: `RLVER_DIST_CPU_BFLOAT16` is neither 0 nor 1.
    """
    forced = os.environ.get(OVERRIDE, "")
    if forced:
        if forced not in ("0", "1"):
            raise ConfigError(f"{OVERRIDE}={forced}: use 0 or 1, or unset it to ask the CPU")
        return forced == "1"
    lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPU_INFO.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not BFLOAT16_FLAGS.isdisjoint(flags)


def resolve_precision(dtype: Precision, *, on_cpu: bool) -> Precision:
    """`dtype` with `auto` decided: bfloat16 on GPUs and on CPUs with the instructions for it, else
    float32."""
    if dtype is not Precision.auto:
        return dtype
    return Precision.float32 if on_cpu and not cpu_has_bfloat16() else Precision.bfloat16


def with_precision(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """`config` with every `auto` format decided, as this process's machine has it, and lines that say why or
    warn of the cost."""
    on_cpu = config.cluster.device is Device.cpu
    engine = config.simulator.engine
    chosen = {"model.dtype": config.model.dtype}
    if config.simulator.backend is SimulatorBackend.vllm:
        chosen["simulator.engine.dtype"] = engine.dtype
    notices = [notice for key, dtype in chosen.items() if on_cpu and (notice := _notice(key, dtype))]
    model = replace(config.model, dtype=resolve_precision(config.model.dtype, on_cpu=on_cpu))
    engine = replace(engine, dtype=resolve_precision(engine.dtype, on_cpu=on_cpu))
    return replace(config, model=model, simulator=replace(config.simulator, engine=engine)), notices


def _notice(key: str, dtype: Precision) -> str:
    """What the user has to know of this format on a CPU; empty where nothing was chosen or is slow."""
    if cpu_has_bfloat16():
        return (
            f"{key}=bfloat16, chosen since this CPU has instructions for it"
            if dtype is Precision.auto
            else ""
        )
    lacking = f"this CPU has no bfloat16 instructions ({' or '.join(sorted(BFLOAT16_FLAGS))})"
    if dtype is Precision.auto:
        return f"{key}=float32, chosen since {lacking}"
    if dtype is Precision.bfloat16:
        return (
            f"warning: {key}=bfloat16: {lacking} and computes 5 to 12 times slower than in float32; use "
            f"auto or float32"
        )
    return ""
