"""What a back end is told of a mask, and how it says no."""

from dataclasses import dataclass, field
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.masks import Mask
from partitioning import UserError

Keys = Literal["row", "cache", "memory"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """Who sees whom in one call of an attention layer: as a matrix, and as the mask's structure.

    A back end reads the one or the other; the compiler drops what nobody reads.

    Args:
      visible: the mask, lowered, with the segment rule.
      mask: the same as a mask, without the segment rule.
      segments, positions: of the tokens of this call; another network's keys have none.
      at: slots of the queries, or None where all slots have one.
      keys: whose keys they are: this call's tokens', a cache's with room for more, or another network's.
    """

    visible: Bool[Array, "B Q K"]
    mask: Mask
    segments: Int[Array, "B S"] | None = None
    positions: Int[Array, "B S"] | None = None
    at: Int[Array, "B Q"] | None = None
    keys: Keys = field(default="row", metadata={"static": True})


def refuse(backend: str, what: str) -> NoReturn:
    """What a back end cannot express is refused by name.

    Raises:
      UserError: always.
    """
    raise UserError(f"Attention.backend = '{backend}' cannot compute {what}: use 'xla'")


def over_heads(x: Float[Array, "B S G K"], heads: int) -> Float[Array, "B S H K"]:
    """Keys or values of grouped queries, once for each of their queries' heads."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
