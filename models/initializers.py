"""Initial weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 0.02) -> Float[Array, "*shape"]:
    """Normal draws with standard deviation `scale`, cut at three of them."""
    return scale * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)
