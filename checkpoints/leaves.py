"""A pytree as a flat table of named arrays: what a checkpoint holds, compares and checks."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from partitioning.errors import UserError

NAMED_AT_MOST = 6


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path, joined by "/"; containers without leaves vanish.

    Raises:
      ValueError: two leaves have the same joined path.
    """
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise ValueError(f"two leaves are both called {name!r}")
        flat[name] = leaf
    return flat


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds PRNG keys, which are stored as the unsigned integers they are made of."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """A leaf as an array that can be stored: keys become their data.

    Raises:
      ValueError: a 64-bit numpy array or number that jax, without x64, would cut to 32 bits.
    """
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if is_key(leaf) else leaf
    given = np.asarray(leaf)
    array = jnp.asarray(given)
    if isinstance(leaf, (np.ndarray, np.generic)) and array.dtype != given.dtype:
        raise ValueError(f"a {given.dtype} numpy leaf would be stored as {array.dtype}: convert it first")
    return array


def plain_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The stored shape, dtype and sharding of an array or `ShapeDtypeStruct`; without a sharding, the first device."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        # The key's own words are never split: its sharding's specification holds for the axes that it has.
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def like_abstract(stored: Any, leaf: Any) -> Any:
    """A restored array as its abstract leaf has it: key data become keys again."""
    if not is_key(leaf):
        return stored
    kinds: list[Any] = []
    # The public way to ask for a key's kind wants an array, which a traced one is and a shape is not.
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.random.wrap_key_data(stored, impl=kinds[0])


def table(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each stored leaf, as JSON has them."""
    return {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in flat.items()}


def compare(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str, whole: bool) -> None:
    """Checks that a checkpoint's table holds the leaves that a model wants.

    Args:
      stored: the checkpoint's table.
      wanted: the table of the model's leaves.
      where: names the checkpoint in the message.
      whole: whether leaves that the model does not want are a fault too.

    Raises:
      UserError: leaves are missing, extra, or of another shape or dtype; the first few by name.
    """
    faults = [f"{name!r} is missing in it" for name in sorted(set(wanted) - set(stored))]
    for name in sorted(set(wanted) & set(stored)):
        there, here = stored[name], wanted[name]
        if list(there["shape"]) != list(here["shape"]):
            faults.append(f"{name!r} is {tuple(there['shape'])} in it and {tuple(here['shape'])} in the model")
        elif there["dtype"] != here["dtype"]:
            faults.append(f"{name!r} is {there['dtype']} in it and {here['dtype']} in the model")
    if whole:
        faults += [f"{name!r} is only in it" for name in sorted(set(stored) - set(wanted))]
    if faults:
        more = f"; and {len(faults) - NAMED_AT_MOST} more" if len(faults) > NAMED_AT_MOST else ""
        raise UserError(f"{where} is of another model: " + "; ".join(faults[:NAMED_AT_MOST]) + more)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of an array as unsigned 32-bit numbers, one or two for an element."""
    if leaf.dtype == jnp.bool_ or (jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype.itemsize == 1):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf.astype(jnp.int8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit numbers in which every input bit moves every output bit (murmur3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _checksum(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    # One changed word always changes the first sum, whose weights are odd; the second is not linear in the words.
    first = jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)
    second = jnp.sum(_scramble(words + _scramble(index + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)
    return jnp.stack([first, second])


@functools.cache
def _checksum_on(whole: NamedSharding | None) -> Any:
    """The checksum of one leaf as a program for each shape and sharding: a deep model has few of them, not one of all."""
    return jax.jit(_checksum, out_shardings=whole)


def checksums(flat: Mapping[str, jax.Array]) -> dict[str, str]:
    """A 64-bit checksum of the bits of each leaf, computed where the leaf lies.

    Two sums modulo 2^32 over all elements, with weights by global index: exact in any order, hence the same under every
    sharding, at the cost of reading the leaf once. It tells faults of disk and transport, not forgery.

    Returns:
      Name -> 16 hexadecimal digits.
    """
    whole = lambda at: NamedSharding(at.mesh, PartitionSpec()) if isinstance(at, NamedSharding) else None
    # Each is waited for: many small programs with collectives in flight at once are more than fake devices bear.
    sums = {name: jax.device_get(_checksum_on(whole(leaf.sharding))(leaf)) for name, leaf in flat.items()}
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in sorted(sums.items())}


def content_hash(flat: Mapping[str, jax.Array]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all leaves, in the order of their names (host memory)."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        leaf = flat[name]
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        host = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{name}\0{host.dtype}\0{host.shape}\0".encode())
        digest.update(host.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
