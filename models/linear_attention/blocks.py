"""What all chunked forms share: rows cut into blocks of chunks, scanned with a state, each block computed again in the
backward pass, so that memory grows with the states between blocks only."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# exp of it is 0 in float32; a gate that is shut has -inf, and sums of that have no gradient.
LEAST = -200.0


def scanned(
    block: Callable[[Array, dict[str, Array]], tuple[Array, Array]],
    state: Float[Array, "B H K V"],
    parts: Mapping[str, Any],
    *,
    chunk: int,
    chunks: int,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """Runs `block` over a row.

    Args:
      block: from a state and the parts of a block, `[B, H, chunks, chunk, ...]` (those without heads `[B, chunks, chunk]`),
        to the next state and outputs `[B, H, chunks, chunk, V]`.
      state: before the first token.
      parts: `[B, S, H, ...]` or `[B, S]`. What fills the last block is zero: no key, no decay, no new document.
      chunk, chunks: tokens of a chunk, and chunks of a block; fewer where the row is short.

    Returns:
      The outputs and the last state.
    """
    length = next(iter(parts.values())).shape[1]
    chunk = min(chunk, length)
    chunks = min(chunks, -(-length // chunk))
    blocks = -(-length // (chunk * chunks))
    cut = {name: _cut(x, (blocks, chunks, chunk)) for name, x in parts.items()}
    state, out = jax.lax.scan(partial(jax.checkpoint, prevent_cse=False)(block), state, cut)
    blocks, rows, heads, chunks, chunk, width = out.shape
    out = out.transpose(1, 0, 3, 4, 2, 5).reshape(rows, blocks * chunks * chunk, heads, width)
    return out[:, :length], state


def _cut(x: Array, sizes: tuple[int, int, int]) -> Array:
    """[B, S, H, ...] -> [blocks, B, H, chunks, chunk, ...]."""
    missing = math.prod(sizes) - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)).reshape(x.shape[0], *sizes, *x.shape[2:])
    return x.swapaxes(0, 1) if x.ndim == 4 else x.transpose(1, 0, 4, 2, 3, *range(5, x.ndim))


def weights(g: Float[Array, "B H M C"], resets: Array) -> tuple[Float[Array, "B H M C C"], Float[Array, "B H M C"]]:
    """exp(g_{j+1} + .. + g_i) for j <= i of one document, else 0; and exp(g_1 + .. + g_i) where the first document of the
    chunk goes on, else 0."""
    document = jnp.cumsum(resets, axis=-1)[:, None]
    same = (document[..., :, None] == document[..., None, :]) & jnp.tri(g.shape[-1], dtype=bool)
    g = jnp.maximum(g, LEAST)
    within = jnp.where(same, jnp.exp(between(g)), 0)
    return within, jnp.where(document == 0, jnp.exp(jnp.cumsum(g, axis=-1)), 0)


def between(g: Float[Array, "*B C"]) -> Float[Array, "*B C C"]:
    """The sum of g over j < t <= i: each by itself, since a difference of two long sums is far from exact where they are
    large and it is small."""
    size = g.shape[-1]
    later = jnp.tri(size, k=-1, dtype=bool)
    return jnp.einsum(
        "it,...tj->...ij", jnp.tri(size, dtype=g.dtype), jnp.where(later, g[..., None], 0), precision="highest"
    )
