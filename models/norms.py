"""Normalisations over the features of a token. A norm is told which tokens are no padding; these have no use for it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.variables import param


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_mean_square(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    return x * (1 / jnp.sqrt(_mean(x * x) + eps))


@unit_mean_square.defjvp
def _unit_mean_square_jvp(eps, primals, tangents):
    # The gradient takes the result and one number a token; the chain rule would keep the input too.
    (x,), (t,) = primals, tangents
    inverse = 1 / jnp.sqrt(_mean(x * x) + eps)
    y = x * inverse
    return y, inverse * (t - y * _mean(y * t))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardised(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """(x - mean) / sqrt(var + eps) over the last dimension."""
    return unit_mean_square(x - _mean(x), eps)


@standardised.defjvp
def _standardised_jvp(eps, primals, tangents):
    (x,), (t,) = primals, tangents
    centred = x - _mean(x)
    inverse = 1 / jnp.sqrt(_mean(centred * centred) + eps)
    y = centred * inverse
    return y, inverse * (t - _mean(t) - y * _mean(y * t))


def _mean(x):
    return x.mean(-1, keepdims=True)


class LayerNorm(nnx.Module):
    """Centres and scales the features of each token, statistics in float32.

    y = (x - mean) / sqrt(var + eps) * scale + bias.

    Args:
      width: D.
      eps: added to the variance.
      bias: whether there is a bias.
      scale: whether there is a scale.
      axis: the logical name of the features.

    Source: "Layer Normalization", Ba et al., 2016.
    Differs: nothing known.
    """

    def __init__(self, width: int, *, eps: float = 1e-6, bias: bool = True, scale: bool = True, axis: str = "embed"):
        self.eps = eps
        self.scale = param(jnp.ones((width,)), (axis,)) if scale else None
        self.bias = param(jnp.zeros((width,)), (axis,)) if bias else None

    def __call__(self, x: Float[Array, "*B D"], present: Any = None) -> Float[Array, "*B D"]:
        """Normalises the last dimension."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = standardised(wide, self.eps)
        scaled = scaled if self.scale is None else scaled * self.scale.get_value()
        return (scaled if self.bias is None else scaled + self.bias.get_value()).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Scales the features of each token by their root mean square, statistics in float32.

    y = x / sqrt(mean(x^2) + eps) * scale + bias.

    Args:
      width: D.
      eps: added to the mean square.
      bias: whether there is a bias.
      scale: whether there is a scale; SimpleRMSNorm has none.
      around_one: whether the parameter is scale - 1, so that weight decay draws the scale to 1.
      axis: the logical name of the features.

    Source: "Root Mean Square Layer Normalization", Zhang and Sennrich, 2019; without a scale: "Scaling TransNormer to 175
      Billion Parameters", Qin et al., 2023.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        bias: bool = False,
        scale: bool = True,
        around_one: bool = False,
        axis: str = "embed",
    ):
        self.eps, self.around_one = eps, around_one
        self.scale = param((jnp.zeros if around_one else jnp.ones)((width,)), (axis,)) if scale else None
        self.bias = param(jnp.zeros((width,)), (axis,)) if bias else None

    def __call__(self, x: Float[Array, "*B D"], present: Any = None) -> Float[Array, "*B D"]:
        """Normalises the last dimension."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scaled = unit_mean_square(wide, self.eps)
        if self.scale is not None:
            scaled = scaled * (self.scale.get_value() + self.around_one)
        return (scaled if self.bias is None else scaled + self.bias.get_value()).astype(x.dtype)


class NoNorm(nnx.Module):
    """Leaves its input as it is: where a family has no norm at a place that its other layers have.

    Args:
      width: D, for nothing.
    """

    def __init__(self, width: int):
        del width

    def __call__(self, x: Float[Array, "*B D"], present: Any = None) -> Float[Array, "*B D"]:
        """The same."""
        return x
