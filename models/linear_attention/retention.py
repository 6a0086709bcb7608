"""RetNet's retention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import linear, side_by_side
from models.linear_attention.apply import Backend
from models.linear_attention.decays import log_decays
from models.linear_attention.mixer import LinearMixer, Parts
from models.norms import RMSNorm
from models.positions import rotate
from models.variables import param
from partitioning import UserError


class Retention(LinearMixer):
    """Multi-scale retention: rotated queries and keys, a fixed decay for each head, a norm in each head and a swish gate.

    S_t = gamma_h S_{t-1} + k_t v_t^T,  gamma_h = 1 - 2^(-5 - h),  k = rotate(x W_k) / sqrt(K);
    y = (silu(x W_g) * norm_h(S_t^T rotate(x W_q))) W_o.

    Args:
      width: D.
      heads: H.
      head_width: K of queries and keys; D / H by default.
      value_expansion: values are so many times as wide.
      theta: base of the rotary frequencies.
      norm: a class, called with the features of one head; RMSNorm without a scale by default.
      backend: 'pallas' is a TPU's kernel.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide.

    Source: "Retentive Network: A Successor to Transformer for Large Language Models", Sun et al., 2023.
    Differs: rotary pairs are the two halves of a head; scores are not divided by the sums of their row, which the norm makes
      immaterial up to its eps.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        head_width: int | None = None,
        value_expansion: int = 2,
        theta: float = 10_000.0,
        norm: Callable[..., nnx.Module] | None = None,
        backend: Backend = "xla",
        rngs: nnx.Rngs,
    ):
        if head_width is None and width % heads:
            raise UserError(
                f"Retention.heads = {heads} does not divide the width {width}: change one, or set head_width"
            )
        size = width // heads if head_width is None else head_width
        super().__init__(width, heads=heads, key_width=size, value_width=value_expansion * size, rngs=rngs)
        self.theta, self.backend = theta, backend
        inner = lambda features: param(normal(rngs, (width, heads, features)), ("embed", "heads", "kv"))
        self.query, self.key = inner(size), inner(size)
        self.value, self.gate = inner(self.value_width), inner(self.value_width)
        self.norm: Any = (partial(RMSNorm, scale=False) if norm is None else norm)(self.value_width, axis="kv")

    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """See `LinearMixer.parts`."""
        kernels = [p.get_value().astype(hidden.dtype) for p in (self.query, self.key, self.value)]
        q, k, v = side_by_side(hidden, kernels)
        q, k = (rotate(x, context.positions, self.theta) for x in (q, k * self.key_width**-0.5))
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        decay = log_decays("retnet", heads=self.heads, layer=0, layers=1, dtype=wide)
        return (q, k, v, decay[None, None]), {}

    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """See `LinearMixer.finish`."""
        gate = jax.nn.silu(linear(hidden, self.gate.get_value().astype(hidden.dtype)))
        return gate * self.norm(mixed)
