"""What a compiled step cannot raise: it makes its numbers NaN, and the guard names the step."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def spoiled(value: Float[Array, "..."], wrong: Bool[Array, "..."]) -> Float[Array, "..."]:
    """`value`, and NaN where something is wrong: 0 / 0 there, as `--debug` would take a constant NaN for the first of a run.

    Args:
      value: stays exactly what it is where nothing is wrong.
      wrong: broadcasts with `value`.
    """
    return jnp.where(wrong, 0, value) / jnp.where(wrong, 0, 1).astype(value.dtype)
