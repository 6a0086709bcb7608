"""Experts on sorted rows by `ragged_dot`: a kernel on TPUs; elsewhere XLA multiplies all rows by all matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.feed_forward import ACTIVATIONS, Activation

dot = jax.lax.ragged_dot


def ragged(
    activation: Activation,
    x: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    inner: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    outer: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """Tokens sorted by expert, and `ragged_dot` for each matrix.

    Args:
      activation: by name.
      x: states.
      weights, chosen: of each token's experts.
      inner, gate, outer: W, V and U of every expert.
    """
    flat, k = chosen.reshape(-1), chosen.shape[1]
    order = jnp.argsort(flat, stable=True)
    at = lambda values: values[order][:, None]
    each, _ = sorted_rows(x[order // k], at(weights.reshape(-1)), at(flat), inner, gate, outer, activation=activation)
    return each[jnp.argsort(order)].reshape(*chosen.shape, -1).sum(1)


def sorted_rows(
    x: Float[Array, "N D"],
    weights: Float[Array, "N 1"],
    chosen: Int[Array, "N 1"],
    inner: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    outer: Float[Array, "E F D"],
    *,
    activation: Activation,
) -> tuple[Float[Array, "N D"], tuple[Array, Array]]:
    """Rows by one expert each, in the order of the experts, times their weights; and what the backward pass takes.

    Args:
      x: states.
      weights, chosen: of each row's expert. From the first row of an expert that is not there on, results mean nothing.
      inner, gate, outer: W, V and U of every expert.
      activation: by name.
    """
    sizes = _sizes(chosen, inner)
    a, b = dot(x, inner, sizes), dot(x, gate, sizes)
    return _last(activation, sizes, a, b, weights, outer), (a, b)


def sorted_rows_backward(pull, x, weights, chosen, inner, gate, outer, kept, *, activation):
    """The gradients of `sorted_rows`, in the order of its arguments; its result is not needed again."""
    sizes = _sizes(chosen, inner)
    _, back = jax.vjp(lambda *args: _last(activation, sizes, *args), *kept, weights, outer)
    da, db, dw, d_outer = back(pull)
    _, back = jax.vjp(lambda x, inner, gate: (dot(x, inner, sizes), dot(x, gate, sizes)), x, inner, gate)
    dx, d_inner, d_gate = back((da, db))
    return dx, dw, None, d_inner, d_gate, d_outer


def _last(activation, sizes, a, b, weights, outer):
    # Weighted before the product, so that a weight's gradient does not ask for its result.
    return dot(ACTIVATIONS[activation](a) * b * weights.astype(a.dtype), outer, sizes)


def _sizes(chosen, inner):
    return jnp.bincount(chosen[:, 0], length=len(inner)).astype(jnp.int32)
