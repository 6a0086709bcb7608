"""What all layers of a trunk share of the distances between tokens: a bias a head, or vectors that mixers project."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.block import Context
from models.initializers import normal
from models.masks import Tokens
from models.variables import param
from partitioning import UserError, constrain, ways


def t5_buckets(buckets: int, longest: int, *, two_sided: bool) -> Int[np.ndarray, " 2L+1"]:
    """T5's bucket of each distance key - query from -longest to longest; those farther away are as the last ones.

    Half of a side's buckets are single distances, the others widen as logarithms do.
    """
    distance = np.arange(-longest, longest + 1)
    side = buckets // 2 if two_sided else buckets
    far = np.abs(distance) if two_sided else np.maximum(-distance, 0)
    exact = side // 2
    share = np.log(np.maximum(far, 1) / exact) / math.log(longest / exact)
    # A distance on a border, where rounding could decide, belongs to the bucket that begins there.
    wide = exact + np.floor(share * (side - exact) + 1e-9).astype(np.int64)
    return np.where(far < exact, far, np.minimum(wide, side - 1)) + (side * (distance > 0) if two_sided else 0)


def log_buckets(buckets: int, longest: int) -> Int[np.ndarray, " 2L+1"]:
    """DeBERTa's bucket, from -buckets to buckets, of each distance query - key from -longest to longest."""
    distance = np.arange(-longest, longest + 1)
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle)
    share = np.log(far / middle) / math.log((longest - 1) / middle)
    wide = np.ceil(share * (middle - 1) - 1e-9).astype(np.int64) + middle
    return np.where(np.abs(distance) <= middle, distance, np.sign(distance) * wide)


def _looked_up(table: np.ndarray, query: Tokens, key: Tokens) -> Int[Array, "B Q K"]:
    """Entries of a table over key - query."""
    longest = len(table) // 2
    distance = key.positions[:, None, :] - query.positions[:, :, None]
    return jnp.asarray(table, jnp.int32)[jnp.clip(distance, -longest, longest) + longest]


def spread(table: Float[Array, "N H"], index: Int[Array, "B Q K"]) -> Float[Array, "B H Q K"]:
    """Each head's entries of a table, queries cut as the rows' length is.

    The gradient is a matrix product with the indices as ones and zeros: by the chain rule it would be one addition after
    another.
    """
    index = constrain(index, "batch", "length", None)
    return constrain(_spread(table, index, ways("length")), "batch", "heads", "length", None)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(table, index, parts):
    return jax.vmap(lambda column: column[index], in_axes=1, out_axes=1)(table)


def _spread_forward(table, index, parts):
    return _spread(table, index, parts), (index, table.shape[0])


def _spread_backward(parts, kept, pull):
    index, size = kept
    one_hot = lambda index: (index[..., None] == jnp.arange(size)).astype(pull.dtype)
    # A row of queries after another: all at once the ones and zeros would be `size` times the indices.
    # Of each part that lies on other devices one row, or the scan would gather them.
    body = lambda total, q: (total + jnp.einsum("bhpk,bpkn->nh", q[0], one_hot(q[1])), None)
    start = jnp.zeros((size, pull.shape[1]), pull.dtype)
    split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :]), axis + 1, 0)
    return jax.lax.scan(body, start, (split(pull, 2), split(index, 1)))[0], None


_spread.defvjp(_spread_forward, _spread_backward)


class RelativeBias(nnx.Module):
    """A learned number for each head and bucket of distances, added to the scores of every layer.

    score_qk = q k^T + b[bucket(position_k - position_q)].

    Args:
      width: D, for nothing.
      heads: H of the layers' mixers.
      buckets: of distances, an even number where both sides have some.
      longest: distances from here on share a bucket.
      two_sided: whether tokens ahead have buckets of their own; otherwise they are all as the token itself.
      rngs: where the initial weights come from.

    Raises:
      UserError: too few buckets, or no distance left for the wide ones.

    Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al., 2020.
    Differs: distances are those within a document.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        buckets: int = 32,
        longest: int = 128,
        two_sided: bool = True,
        rngs: nnx.Rngs,
    ):
        exact = buckets // (4 if two_sided else 2)
        if exact < 1 or longest <= exact:
            raise UserError(
                f"RelativeBias.buckets = {buckets}, longest = {longest}: expected 4 buckets or more, and fewer"
            )
        self.buckets = nnx.static(tuple(t5_buckets(buckets, longest, two_sided=two_sided).tolist()))
        self.table = param(normal(rngs, (buckets, heads)), (None, "heads"))

    def __call__(self, context: Context, query: Tokens, key: Tokens) -> Context:
        """Adds the bias to the context's."""
        bias = spread(self.table.get_value(), _looked_up(np.asarray(self.buckets), query, key))
        return replace(context, bias=bias if context.bias is None else bias + context.bias)


class RelativePlaces(nnx.Module):
    """A learned vector for each bucket of distances, which `DisentangledAttention` projects in every layer.

    Args:
      width: D.
      buckets: on one side.
      longest: distances from here on share a bucket.
      rows: of the table; 2 `buckets` by default, and one fewer in LTG-BERT, whose two sides are alike.
      norm: of the vectors, a class called with the width; None for none.
      rngs: where the initial weights come from.

    Raises:
      UserError: too few buckets, or no distance left for the wide ones.

    Source: "DeBERTa", He et al., 2021; buckets and norm: the released DeBERTa v2.
    Differs: distances are those within a document.
    """

    def __init__(
        self,
        width: int,
        *,
        buckets: int = 256,
        longest: int = 512,
        rows: int | None = None,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        if buckets < 4 or longest <= buckets // 2 + 1:
            raise UserError(
                f"RelativePlaces.buckets = {buckets}, longest = {longest}: expected 4 buckets or more, and fewer"
            )
        rows = 2 * buckets if rows is None else rows
        # The table below is over key - query, DeBERTa's buckets go the other way.
        index = np.clip(log_buckets(buckets, longest)[::-1] + rows - buckets, 0, rows - 1)
        self.buckets = nnx.static(tuple(index.tolist()))
        self.table = param(normal(rngs, (rows, width)), (None, "embed"))
        self.norm: Any = None if norm is None else norm(width)

    def __call__(self, context: Context, query: Tokens, key: Tokens) -> Context:
        """Puts the vectors, and each pair's row of them, into the context."""
        table = self.table.get_value()
        table = table if self.norm is None else self.norm(table)
        index = constrain(_looked_up(np.asarray(self.buckets), query, key), "batch", "length", None)
        return replace(context, relative=(table, index))
