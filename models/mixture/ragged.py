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
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=len(inner)).astype(jnp.int32)
    rows = x[order // chosen.shape[1]]
    hidden = ACTIVATIONS[activation](dot(rows, inner, sizes)) * dot(rows, gate, sizes)
    each = dot(hidden, outer, sizes)[jnp.argsort(order)]
    return (each.reshape(*chosen.shape, -1) * weights[..., None].astype(x.dtype)).sum(1)


def sorted_rows(
    x: Float[Array, "R l d"],
    weights: Float[Array, " R"],
    sizes: Int[Array, " E"],
    inner: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    outer: Float[Array, "E F D"],
    *,
    activation: Activation,
    part: int,
) -> tuple[Float[Array, "R l d"], tuple[()]]:
    """Rows that lie by expert, times their weights, as many of them as there are: a loop walks these in parts.

    Args:
      x: states, each in l lines, D = l d; what lies behind the last expert's rows is not looked at.
      weights: of each row.
      sizes: rows of each expert.
      inner, gate, outer: W, V and U of every expert.
      activation: by name.
      part: rows at a time; a divisor of R.

    Returns:
      Results, and nothing that the backward pass takes.
    """

    def walk(i, out):
        rows, here = _part(i, part, sizes)
        mine = rows(x).reshape(part, -1)
        a, b = dot(mine, inner, here), dot(mine, gate, here)
        # Weighted before the product, so that a weight's gradient does not ask for its result.
        hidden = ACTIVATIONS[activation](a) * b * rows(weights)[:, None].astype(x.dtype)
        return _set(out, dot(hidden, outer, here), i)

    return jax.lax.fori_loop(0, _parts(sizes, part), walk, jnp.zeros_like(x)), ()


def sorted_rows_backward(pull, x, weights, sizes, inner, gate, outer, kept, *, activation, part):
    """The gradients of `sorted_rows` by states, weights and matrices; what is inside is computed again, part by part.

    Those by states take the place of the results' as these are read.
    """
    del kept
    add = lambda total, x, matrix, here, g: total + _by_matrix(x, matrix, here, g).astype(total.dtype)

    def walk(i, carry):
        dx, dw, d_inner, d_gate, d_outer = carry
        rows, here = _part(i, part, sizes)
        g, mine = (rows(y).reshape(part, -1) for y in (dx, x))
        w = rows(weights)[:, None].astype(x.dtype)
        a, b = dot(mine, inner, here), dot(mine, gate, here)
        s, back = jax.vjp(ACTIVATIONS[activation], a)
        by_hidden = _by_rows(b, outer, here, g)
        dw = _set(dw, (by_hidden * s * b).sum(-1, dtype=dw.dtype), i)
        by_hidden = by_hidden * w
        (da,), db = back(by_hidden * b), by_hidden * s
        dx = _set(dx, _by_rows(mine, inner, here, da) + _by_rows(mine, gate, here, db), i)
        d_outer = add(d_outer, s * b * w, outer, here, g)
        return dx, dw, add(d_inner, mine, inner, here, da), add(d_gate, mine, gate, here, db), d_outer

    sums = [jnp.zeros(m.shape, jnp.promote_types(m.dtype, jnp.float32)) for m in (inner, gate, outer)]
    begin = (pull, jnp.zeros_like(weights), *sums)
    dx, dw, *sums = jax.lax.fori_loop(0, _parts(sizes, part), walk, begin)
    return dx, dw, *(total.astype(m.dtype) for total, m in zip(sums, (inner, gate, outer), strict=True))


def _by_rows(x, matrix, sizes, g):
    """g times each row's transposed matrix; of x the shape is taken."""
    (found,) = jax.linear_transpose(lambda x: dot(x, matrix, sizes), x)(g)
    return found


def _by_matrix(x, matrix, sizes, g):
    """The sum over each expert's rows of x g'."""
    (found,) = jax.linear_transpose(lambda matrix: dot(x, matrix, sizes), matrix)(g)
    return found


def _parts(sizes, part):
    return (sizes.sum() + part - 1) // part


def _part(i, part, sizes):
    """What takes the rows of a part from an array, and how many of them each expert has."""
    ends = jnp.cumsum(sizes)
    clipped = lambda at: jnp.clip(at - i * part, 0, part)
    return lambda x: jax.lax.dynamic_slice_in_dim(x, i * part, part), clipped(ends) - clipped(ends - sizes)


def _set(x, new, i):
    return jax.lax.dynamic_update_slice_in_dim(x, new.reshape(-1, *x.shape[1:]), i * len(new), axis=0)
