"""Dropout whose draws belong to rows, so that neither sharding nor micro-batches change them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "B *rest"], rate: float, keys: jax.Array | None) -> Float[Array, "B *rest"]:
    """Zeroes features with probability `rate` and scales the rest; each row draws from its own key. No keys, no dropout."""
    if not rate or keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)
