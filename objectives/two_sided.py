"""What objectives for encoder-decoders share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from objectives.denoise import Side
from partitioning import UserError


def needs_both(trunk: Any, owner: str) -> None:
    """Refuses a trunk without a decoder beside it.

    Raises:
      UserError: the trunk is none of the two-sided ones.
    """
    if not trunk.two_sided:
        raise UserError(
            f"{owner} writes beside what it reads: expected an encoder-decoder, training.Run.model = @models.t5"
        )


def pushed(side: Side, first: int) -> Int[Array, "B T"]:
    """What a decoder reads to write a side: the token before each where that is its neighbour in its document, else `first`."""
    tokens, segments, positions = side
    follows = (segments[:, 1:] == segments[:, :-1]) & (positions[:, 1:] == positions[:, :-1] + 1)
    before = jnp.where(follows, tokens[:, :-1], first)
    return jnp.pad(before, ((0, 0), (1, 0)), constant_values=first).astype(tokens.dtype)


def taught(trunk: Any, read: Side, written: Side, *, first: int, keys: jax.Array | None) -> Float[Array, "B T D"]:
    """The decoder's states at the tokens that it is to write, each told what stands before it.

    Args:
      trunk: an encoder-decoder.
      read, written: both sides.
      first: what the decoder reads where nothing stands before.
      keys: of dropout.
    """
    return trunk(
        read.tokens,
        segments=read.segments,
        positions=read.positions,
        targets=pushed(written, first),
        target_segments=written.segments,
        target_positions=written.positions,
        keys=keys,
    ).hidden
