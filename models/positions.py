"""Positions: rotary and learned, and the states at some of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from models.few_rows import once
from models.initializers import normal
from models.rope_scaling import RopeScaling
from models.variables import param
from partitioning import whole


def rotate(
    x: Float[Array, "B S H K"],
    positions: Int[Array, "B S"],
    theta: float,
    scaling: RopeScaling | None = None,
    features: int | None = None,
) -> Float[Array, "B S H K"]:
    """Rotates pairs (x_i, x_{i+K/2}) by the angle position * theta^(-2i/K), its frequency scaled where `scaling` says so.

    Args:
      x: queries or keys.
      positions: of the tokens.
      theta, scaling: base of the frequencies, and what scales them.
      features: how many are rotated, the first ones, as if K were so many; all by default.

    Source: "RoFormer", Su et al., 2021.
    Differs: the pairs are the two halves of a head (as in GPT-NeoX), not neighbours.
    """
    rest = x[..., x.shape[-1] if features is None else features :]
    half = (x.shape[-1] - rest.shape[-1]) // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Constants of a program: what it computed in every layer would be so many values to carry around a loop over tokens.
    with jax.ensure_compile_time_eval():
        frequencies, factor = theta ** (-jnp.arange(half, dtype=wide) / half), 1.0
        if scaling is not None:
            frequencies, factor = scaling(frequencies, theta)
    angles = (positions[..., None] * frequencies)[:, :, None, :]
    cos, sin = once(factor * jnp.stack([jnp.cos(angles), jnp.sin(angles)]))
    first, second = x[..., :half].astype(wide), x[..., half : 2 * half].astype(wide)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def gather(x: Shaped[Array, "B S *D"], at: Int[Array, "B K"]) -> Shaped[Array, "B K *D"]:
    """What stands at some slots of each row."""
    return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)


def last_documents(segments: Int[Array, "B S"], before: Int[Array, B] | None = None) -> Int[Array, "B S+1"]:
    """The document of the last token that is no padding: before each slot, and behind the last one.

    Args:
      segments: the document of each token, 0 for padding.
      before: what it is before the first slot; 0, none, by default.
    """
    before = jnp.zeros(segments.shape[:1], segments.dtype) if before is None else before
    known = jnp.concatenate([before[:, None], segments], axis=1)
    last = jax.lax.cummax(jnp.where(known > 0, jnp.arange(known.shape[1]), 0), axis=1)
    return jnp.take_along_axis(known, last, axis=1)


def borders(segments: Int[Array, "B S"], before: Int[Array, B] | None = None) -> Bool[Array, "B S"]:
    """Where a document begins: a token whose document is not that of the last one; arguments as in `last_documents`."""
    return (segments > 0) & (segments != last_documents(segments, before)[:, :-1])


def few(at: Int[Array, "B K"] | None) -> AbstractContextManager[None]:
    """Inside, states are those of some slots of a row, which no device shares; with None they are those of all."""
    return nullcontext() if at is None else whole("length")


class LearnedPositions(nnx.Module):
    """A learned vector for each place in the document.

    Args:
      width: D.
      longest: places that have a vector; a row may not be longer.
      offset: rows of the table before that of place 0, which nothing reads (2 in RoBERTa's layout).
    """

    def __init__(self, width: int, *, longest: int, offset: int = 0, rngs: nnx.Rngs):
        self.longest, self.offset = longest, offset
        self.table = param(normal(rngs, (longest + offset, width)), ("length", "embed"))

    def __call__(self, positions: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """The vectors at `positions`, all below `longest`."""
        return jnp.take(self.table.get_value().astype(dtype), positions + self.offset, axis=0)
