"""How programs are compiled: kept on disk for the next start, and with less effort where they run once."""

import os
from typing import Any

import jax

from data.tasks import cache_root


def keep_programs() -> None:
    """Turns XLA's persistent cache on, in `xla/` of the cache folder, unless the user has chosen a place or turned it off.

    A user chooses with jax's own `JAX_COMPILATION_CACHE_DIR`, and turns it off with `JAX_ENABLE_COMPILATION_CACHE=false`.
    """
    config: Any = jax.config
    if config.jax_enable_compilation_cache and config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_root(), "xla"))


def for_one_run(mesh: Any) -> dict[str, Any] | None:
    """Compiler options of a program that runs once, such as the one that makes the initial state.

    For a CPU LLVM takes three times as long to optimise it in full as at its first level, for the same values, bit for bit, in
    the same time. Where `XLA_FLAGS` name a level, that one holds.
    """
    level = "xla_backend_optimization_level"
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {level: 1} if on_cpu and level not in os.environ.get("XLA_FLAGS", "") else None
