"""Named arrays out of an Orbax folder, onto any mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints.faults import BrokenError


def in_bucket(folder: Any) -> bool:
    """Whether a folder is one of an object store, which has no empty folders and renames nothing."""
    return "://" in str(folder)


def finished(path: Any) -> bool:
    """Whether Orbax's write of a folder came to its end: a folder appears when it is whole, in a bucket an object says so."""
    if not in_bucket(path):
        return path.exists()
    from orbax.checkpoint.utils import is_checkpoint_finalized

    return path.exists() and is_checkpoint_finalized(path)


def read(path: Any, stored: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Named leaves of an Orbax folder, by their abstract form; leaves without elements are made.

    Raises:
      BrokenError: the folder cannot be read, or lacks some.
    """
    import orbax.checkpoint as ocp

    full = {name: leaf for name, leaf in stored.items() if leaf.size}
    flat = {}
    if full:
        try:
            # The handler alone: a checkpointer lets hosts wait for each other, also for one that could not read.
            handler = ocp.PyTreeCheckpointHandler()
            restore_args = ocp.checkpoint_utils.construct_restore_args(full)
            args = ocp.args.PyTreeRestore(item=full, restore_args=restore_args, partial_restore=True)
            try:
                flat = handler.restore(path, args=args)
            finally:
                handler.close()
        # Orbax and tensorstore raise many kinds for a damaged folder; all of them mean that it cannot be restored.
        except Exception as error:
            raise BrokenError(f"its arrays cannot be read ({type(error).__name__}: {str(error)[:300]})") from error
        absent = sorted(name for name in full if not isinstance(flat.get(name), jax.Array))
        if absent:
            raise BrokenError(f"{len(absent)} leaves are missing in it, first {absent[0]!r}")
    for name, leaf in stored.items():
        if not leaf.size:
            flat[name] = jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    return flat
