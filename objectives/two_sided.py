"""What objectives for encoder-decoders share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

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


def pushed(
    tokens: Int[Array, "B T"], segments: Int[Array, "B T"], positions: Int[Array, "B T"], first: int
) -> Int[Array, "B T"]:
    """What a decoder reads to write `tokens`: the one before each in its document, where that is its neighbour, else `first`."""
    follows = (segments[:, 1:] == segments[:, :-1]) & (positions[:, 1:] == positions[:, :-1] + 1)
    before = jnp.where(follows, tokens[:, :-1], first)
    return jnp.pad(before, ((0, 0), (1, 0)), constant_values=first).astype(tokens.dtype)
