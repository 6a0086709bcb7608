"""Attention whose scores tell what a token is from how far away it is."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.attention import Attention
from models.linear import linear
from models.positions import gather
from partitioning import UserError


class DisentangledAttention(Attention):
    """Softmax attention over the sum of content to content, content to place and place to content.

    score_qk = (q_q k_k^T + q_q r^k_qk^T + k_k r^q_qk^T) / sqrt(3 K);  r^k and r^q are the layer's key and query projections
    of the vector of the distance from k to q, which `models.RelativePlaces` has.

    The arguments are those of `Attention`; nothing rotates, and all heads have keys of their own.

    Raises:
      UserError: the trunk has no `relative` vectors.

    Source: "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", He et al., 2021.
    Differs: the projections of content and of places are one (`share_att_key`), as in the released v2 and v3.
    """

    def __init__(self, width: int, *, heads: int = 8, head_width: int | None = None, rngs: nnx.Rngs, **options: Any):
        scale = 1 / math.sqrt(3 * (width // heads if head_width is None else head_width))
        super().__init__(
            width, heads=heads, head_width=head_width, theta=None, scale=scale, rngs=rngs, **{"bias": True} | options
        )
        self.scale = scale

    def _bias(
        self,
        q: Float[Array, "B Q H K"],
        k: Float[Array, "B S H K"],
        bias: Float[Array, "#B #H Q S"] | None,
        context: Any,
    ) -> Float[Array, "B H Q S"]:
        """Both scores with places."""
        if context.relative is None:
            raise UserError("DisentangledAttention: expected models.Trunk.relative = @models.RelativePlaces")
        table, index = context.relative
        index = index if context.at is None else gather(index, context.at)
        places = lambda name: self._heads(linear(table.astype(q.dtype), self._flat(name, q.dtype))[None], name)[0]
        to_place = jnp.einsum("bqhk,rhk->bhqr", q * self.scale, places("key"))
        from_place = jnp.einsum("bshk,rhk->bhsr", k * self.scale, places("query"))
        swapped = _pick(from_place, index.swapaxes(1, 2)).swapaxes(2, 3)
        own = _pick(to_place, index) + swapped
        return own if bias is None else own + bias


def _pick(scores: Float[Array, "B H Q R"], index: Int[Array, "B Q S"]) -> Float[Array, "B H Q S"]:
    return jnp.take_along_axis(scores, index[:, None], axis=3)
