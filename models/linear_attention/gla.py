"""Gated linear attention (GLA): each feature of the keys is forgotten as fast as the token says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import linear, side_by_side
from models.linear_attention.mixer import LinearMixer, Parts
from models.norms import RMSNorm
from models.variables import param
from partitioning import UserError


class GatedLinearAttention(LinearMixer):
    """Linear attention whose keys' features decay each by itself, by a gate of low rank.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,  log a_t = logsigmoid(x W_1 W_2 + b) / tau;
    y = (norm_h(S_t^T q_t) * silu(x W_g)) W_o,  q = x W_q / sqrt(K).

    Args:
      width: D.
      heads: H.
      key_expansion, value_expansion: keys have so many times D features in all, values so many times.
      rank: columns of W_1.
      temperature: tau, which holds the gates near 1.
      norm: a class, called with the features of one head; RMSNorm by default.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", Yang et al., 2023.
    Differs: nothing known.
    """

    form = "gated"

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        key_expansion: float = 0.5,
        value_expansion: float = 1.0,
        rank: int = 16,
        temperature: float = 16.0,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = {"key_expansion": key_expansion * width / heads, "value_expansion": value_expansion * width / heads}
        for name, size in sizes.items():
            if size < 1 or size != int(size):
                raise UserError(
                    f"GatedLinearAttention: heads = {heads} and {name} do not divide the width {width}: change one"
                )
        keys, values = (int(size) for size in sizes.values())
        super().__init__(width, heads=heads, key_width=keys, value_width=values, rngs=rngs)
        self.temperature = temperature
        inner = lambda features: param(normal(rngs, (width, heads, features)), ("embed", "heads", "kv"))
        self.query, self.key, self.value, self.gate = inner(keys), inner(keys), inner(values), inner(values)
        self.forget_in = param(normal(rngs, (width, rank)), ("embed", None))
        self.forget_out = param(normal(rngs, (rank, heads, keys)), (None, "heads", "kv"))
        self.forget_bias = param(jnp.zeros((heads, keys)), ("heads", "kv"))
        self.norm: Any = (RMSNorm if norm is None else norm)(values, axis="kv")

    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """See `LinearMixer.parts`."""
        of = lambda name: getattr(self, name).get_value().astype(hidden.dtype)
        q, k, v = side_by_side(hidden, [of(name) for name in ("query", "key", "value")])
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        asked = linear(linear(hidden, of("forget_in")), of("forget_out")).astype(wide)
        log_decay = jax.nn.log_sigmoid(asked + self.forget_bias.get_value()) / self.temperature
        return (q * self.key_width**-0.5, k, v, log_decay), {}

    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """See `LinearMixer.finish`."""
        return self.norm(mixed) * jax.nn.silu(linear(hidden, self.gate.get_value().astype(hidden.dtype)))
