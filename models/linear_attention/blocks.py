"""What all chunked forms share: rows cut into blocks of chunks, scanned with a state, each block computed again in the
backward pass, so that memory grows with the states between blocks only."""

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
    first = lambda x: x.swapaxes(0, 1)
    by_block = {name: first(cut(x, chunk, chunks)) for name, x in parts.items()}

    @partial(jax.checkpoint, prevent_cse=False)
    def step(state: Array, part: dict[str, Array]) -> tuple[Array, Array]:
        state, out = block(state, {name: turned(x) for name, x in part.items()})
        return state, unturned(out)

    state, out = jax.lax.scan(step, state, by_block)
    return joined(first(out), length), state


def cut(x: Array, chunk: int, chunks: int) -> Array:
    """[B, S, ...] -> [B, blocks, chunks, chunk, ...], filled up with zeros; arguments as in `scanned`."""
    rows, length = x.shape[:2]
    chunk = min(chunk, length)
    chunks = min(chunks, -(-length // chunk))
    blocks = -(-length // (chunk * chunks))
    x = jnp.pad(x, ((0, 0), (0, blocks * chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(rows, blocks, chunks, chunk, *x.shape[2:])


def joined(x: Array, length: int) -> Array:
    """The reverse of `cut`."""
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :length]


def turned(x: Array) -> Array:
    """[B, M, C, H, ...] -> [B, H, M, C, ...], for products of all heads; of one block, which stays in the caches. What has
    no heads stays as it is."""
    return jnp.moveaxis(x, 3, 1) if x.ndim > 3 else x


def unturned(x: Array) -> Array:
    """The reverse of `turned`."""
    return jnp.moveaxis(x, 1, 3)


def through(
    state: Float[Array, "B H K V"],
    left: Float[Array, "B H M #K 1"],
    added: Float[Array, "B H M K V"],
    *,
    back: bool = False,
) -> tuple[Float[Array, "B H M K V"], Float[Array, "B H K V"]]:
    """The states before each chunk of a block, and behind the last: S_{m+1} = left_m S_m + added_m; `back` from the last to
    the first."""
    order, before = range(added.shape[2]), []
    for m in reversed(order) if back else order:
        before.append(state)
        state = left[:, :, m] * state + added[:, :, m]
    return jnp.stack(before[::-1] if back else before, axis=2), state


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
