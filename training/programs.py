"""Compiled programs are kept on disk, so that a second start does not compile again."""

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
