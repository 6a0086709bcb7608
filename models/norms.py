"""Normalisations over the features of a token."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.variables import param


class LayerNorm(nnx.Module):
    """Centres and scales the features of each token, statistics in float32.

    y = (x - mean) / sqrt(var + eps) * scale + bias.

    Args:
      width: D.
      eps: added to the variance.
      bias: whether there is a bias.

    Source: "Layer Normalization", Ba et al., 2016.
    Differs: nothing known.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, bias: bool = True):
        self.eps = eps
        self.scale = param(jnp.ones((width,)), ("embed",))
        self.bias = param(jnp.zeros((width,)), ("embed",)) if bias else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last dimension."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        scaled = centred * (1 / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + self.eps))
        scaled = scaled * self.scale.get_value()
        return (scaled if self.bias is None else scaled + self.bias.get_value()).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Scales the features of each token by their root mean square, statistics in float32.

    y = x / sqrt(mean(x^2) + eps) * scale.

    Args:
      width: D.
      eps: added to the mean square.

    Source: "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019.
    Differs: nothing known.
    """

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = param(jnp.ones((width,)), ("embed",))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last dimension."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = wide * (1 / jnp.sqrt((wide * wide).mean(-1, keepdims=True) + self.eps))
        return (scaled * self.scale.get_value()).astype(x.dtype)
