"""ReGLA: gated linear attention with bounded features and a gate that does not get stuck."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import side_by_side
from models.linear_attention.mixer import LinearMixer, Parts
from models.norms import RMSNorm
from models.variables import param
from partitioning import UserError


class ReGLA(LinearMixer):
    """Linear attention with normalised exponential features and a refined gate for each of them.

    S_t = F_t * S_{t-1} + phi(x W_k) v_t^T,  y = norm_h(c S_t^T phi(x W_q)) W_o,  phi(z) = exp(z - max_j z_j),
    c = 1 / (e sqrt(K (e^2 - 1))): so that a sum of K products of exp of normal numbers has variance 1;
    F = (1 - r) g^2 + r (1 - (1 - g)^2),  g = sigmoid(x W_f + b), r = sigmoid(x W_r): g where r is a half, and where g is
    stuck near 0 or 1, r still moves it.

    A maximum is over the features of one head of one token. One over the tokens so far would have the state scaled again
    whenever it grows, and one over the whole row would show a token the later ones.

    Args:
      width: D.
      heads: H.
      head_width: K, also of the values; D / H by default.
      gate_bias: what all of b begins as; 3 is g = 0.95.
      norm: a class, called with the features of one head; RMSNorm without a scale by default.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide.

    Source: "ReGLA: Refining Gated Linear Attention", Lu et al., 2025.
    Differs: maxima are a token's own, and gates have biases, without which half of a state would be gone with each token at
      the start.
    """

    form = "gated"

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        head_width: int | None = None,
        gate_bias: float = 3.0,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        if head_width is None and width % heads:
            raise UserError(f"ReGLA.heads = {heads} does not divide the width {width}: change one, or set head_width")
        size = width // heads if head_width is None else head_width
        super().__init__(width, heads=heads, key_width=size, value_width=size, rngs=rngs)
        inner = lambda: param(normal(rngs, (width, heads, size)), ("embed", "heads", "kv"))
        self.query, self.key, self.value, self.forget, self.refine = inner(), inner(), inner(), inner(), inner()
        self.forget_bias = param(jnp.full((heads, size), gate_bias, jnp.float32), ("heads", "kv"))
        self.norm: Any = (partial(RMSNorm, scale=False) if norm is None else norm)(size, axis="kv")

    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """See `LinearMixer.parts`."""
        names = ("query", "key", "value", "forget", "refine")
        kernels = [getattr(self, name).get_value().astype(hidden.dtype) for name in names]
        q, k, v, forget, refine = side_by_side(hidden, kernels)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        scale = 1 / (math.e * math.sqrt(self.key_width * (math.e**2 - 1)))
        log_decay = refined(forget.astype(wide) + self.forget_bias.get_value(), refine.astype(wide))
        return (scale * features(q), features(k), v, log_decay), {}

    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """See `LinearMixer.finish`."""
        del hidden
        return self.norm(mixed)


def features(z: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """exp(z - max z) over the last dimension, all in (0, 1]."""
    return jnp.exp(z - z.max(-1, keepdims=True))


def refined(forget: Float[Array, "*B"], refine: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log((1 - r) g^2 + r (1 - (1 - g)^2)) for g = sigmoid(forget), r = sigmoid(refine).

    An open gate has F = 1 - (1 - g)(2 (1 - r) g + 1 - g), one that shuts F = g (g + 2 r (1 - g)): no term is taken from
    another, so the logarithm is exact where F is next to 1 and where it is next to 0.
    """
    log_open, log_shut = jax.nn.log_sigmoid(forget), jax.nn.log_sigmoid(-forget)
    shut = jnp.where(forget > 0, jnp.exp(log_shut), 0)
    near_one = jnp.log1p(-shut * (2 * jax.nn.sigmoid(-refine) * (1 - shut) + shut))
    near_none = log_open + jnp.logaddexp(log_open, math.log(2) + jax.nn.log_sigmoid(refine) + log_shut)
    return jnp.where(forget > 0, near_one, near_none)
