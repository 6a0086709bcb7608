"""Feed-forward layers: plain and gated."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.side import Sides
from models.variables import param
from partitioning import constrain

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class FeedForward(nnx.Module):
    """Two matrices with an activation between them, or three with a gate.

    y = act(x W_in) W_out;  gated: y = (act(x W_in) * (x W_gate)) W_out.

    Args:
      width: D.
      hidden: features inside, 4 D by default.
      activation: gelu (exact), gelu_tanh, silu or relu.
      gated: whether a second projection gates the first.
      bias: whether the projections have biases.
      rngs: where the initial weights come from.

    Source: "GLU Variants Improve Transformer", Shazeer, 2020, for the gated form.
    Differs: nothing known.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        hidden = 4 * width if hidden is None else hidden
        self.activation = activation
        self.inner = param(normal(rngs, (width, hidden)), ("embed", "mlp"))
        self.gate = param(normal(rngs, (width, hidden)), ("embed", "mlp")) if gated else None
        self.outer = param(normal(rngs, (hidden, width)), ("mlp", "embed"))
        self.inner_bias = param(jnp.zeros((hidden,)), ("mlp",)) if bias else None
        self.outer_bias = param(jnp.zeros((width,)), ("embed",)) if bias else None

    def __call__(self, x: Float[Array, "B S D"], present: Float[Array, "B S"]) -> tuple[Float[Array, "B S D"], Sides]:
        """Transforms every token; a dense layer has no side terms."""
        cast = lambda p: p.get_value().astype(x.dtype)  # noqa: E731
        inner = x @ cast(self.inner)
        inner = inner if self.inner_bias is None else inner + cast(self.inner_bias)
        inner = constrain(ACTIVATIONS[self.activation](inner), "batch", "length", "mlp")
        inner = inner if self.gate is None else inner * (x @ cast(self.gate))
        out = inner @ cast(self.outer)
        return (out if self.outer_bias is None else out + cast(self.outer_bias)), {}
