"""From the states of a row's tokens to one vector."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Pooling = Literal["mean", "first", "last"]


def pool(hidden: Float[Array, "B S D"], segments: Int[Array, "B S"], how: Pooling) -> Float[Array, "B D"]:
    """One vector a row: the mean over its tokens, its first token's state or its last's, in float32 at least."""
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    here = (segments > 0).astype(wide.dtype)
    if how == "mean":
        return (wide * here[..., None]).sum(1) / jnp.maximum(here.sum(1), 1)[:, None]
    if how == "first":
        return wide[:, 0]
    last = jnp.maximum((segments > 0).sum(1) - 1, 0)
    return jnp.take_along_axis(wide, last[:, None, None], axis=1)[:, 0]


def unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """x / |x|, 0 for 0."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))
