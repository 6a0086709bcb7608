"""Feed-forward layers: plain and gated."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import linear
from models.side import Beside
from models.variables import param
from partitioning import constrain


@jax.custom_jvp
def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x * Phi(x), Phi the normal distribution function, by erf: `jax.nn.gelu` takes erfc, which costs several times more.

    Source: "Gaussian Error Linear Units", Hendrycks and Gimpel, 2016.
    Differs: nothing known.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    # One array is kept for the backward pass, the slope; by the chain rule it would be three.
    (x,), (t,) = primals, tangents
    below = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    slope = below + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return x * below, t * slope


Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "none"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "none": lambda x: x,
}


class FeedForward(nnx.Module):
    """Two matrices with an activation between them, or three with a gate.

    y = norm(act(x W_in)) W_out;  gated: y = norm(act(x W_in) * (x W_gate)) W_out;  norm only where there is one.

    Args:
      width: D.
      hidden: features inside, 4 D by default.
      activation: gelu (exact), gelu_tanh, silu or relu; none, with a gate, is SGLU.
      gated: whether a second projection gates the first.
      bias: whether the projections have biases.
      inner_norm: a norm's class, called with the features inside; None for none.
      rngs: where the initial weights come from.

    Source: "GLU Variants Improve Transformer", Shazeer, 2020, for the gated form; the norm inside: "NormFormer", Shleifer et
      al., 2021.
    Differs: nothing known.
    """

    # Whether there are side terms, which count every token of a call.
    counts_tokens = False

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = False,
        inner_norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * width if hidden is None else hidden
        self.activation = activation
        self.inner = param(normal(rngs, (width, hidden)), ("embed", "mlp"))
        self.gate = param(normal(rngs, (width, hidden)), ("embed", "mlp")) if gated else None
        self.outer = param(normal(rngs, (hidden, width)), ("mlp", "embed"))
        self.inner_norm: Any = None if inner_norm is None else inner_norm(hidden, axis="mlp")
        self.inner_bias = param(jnp.zeros((hidden,)), ("mlp",)) if bias else None
        self.outer_bias = param(jnp.zeros((width,)), ("embed",)) if bias else None

    def __call__(self, x: Float[Array, "B S D"], present: Float[Array, "B S"]) -> tuple[Float[Array, "B S D"], Beside]:
        """Transforms every token; a dense layer has no side terms."""
        cast = lambda p: p.get_value().astype(x.dtype)
        inner = linear(x, cast(self.inner))
        inner = inner if self.inner_bias is None else inner + cast(self.inner_bias)
        inner = constrain(ACTIVATIONS[self.activation](inner), "batch", "length", "mlp")
        inner = inner if self.gate is None else inner * (linear(x, cast(self.gate)))
        inner = inner if self.inner_norm is None else self.inner_norm(inner)
        out = linear(inner, cast(self.outer))
        return (out if self.outer_bias is None else out + cast(self.outer_bias)), {}
