"""Experts on the tokens that chose them, in blocks of one expert's rows: the work is that of the choices, and little more.

Choices are sorted by expert, and each expert's are padded to whole blocks. A loop goes over the blocks that are used, however
many that is, and multiplies each by its expert's matrices. Both passes gather: a block takes its tokens, a token its k
results, and no result is scattered.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.feed_forward import ACTIVATIONS, Activation

SMALLEST, LARGEST = 8, 256
"""Rows of a block: fewer than the smallest leave a processor idle, more than the largest only pad."""


class Plan(NamedTuple):
    """Where each choice is computed.

    Args:
      place: of each choice, its row.
      choice: of each padded row, the choice that stands there, counted over tokens and their k; N k where none does.
      expert: of each block.
      used: how many blocks there are in fact.
    """

    place: Int[Array, M]
    choice: Int[Array, P]
    expert: Int[Array, G]
    used: Int[Array, ""]

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.choice.size // self.expert.size


def plan(chosen: Int[Array, "N k"], experts: int) -> Plan:
    """Sorts the choices by expert, in the order of the tokens, into blocks.

    Args:
      chosen: experts of each token.
      experts: how many there are.
    """
    flat = chosen.reshape(-1)
    m = flat.size
    rows = 1 << max((m // (2 * experts)).bit_length() - 1, 0)
    rows = min(max(rows, SMALLEST), LARGEST)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    blocks = (sizes + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    expert = flat[order]
    # How far padding has moved each expert's first choice.
    moved = (ends - blocks) * rows - (jnp.cumsum(sizes) - sizes)
    where = jnp.arange(m, dtype=jnp.int32) + moved[expert]
    most = m // rows + min(experts, m)
    choice = jnp.full((most * rows,), m, jnp.int32).at[where].set(order, unique_indices=True)
    place = jnp.zeros((m,), jnp.int32).at[order].set(where, unique_indices=True)
    of = jnp.searchsorted(ends, jnp.arange(most, dtype=ends.dtype), side="right")
    return Plan(place, choice, jnp.minimum(of, experts - 1), ends[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocks(
    activation: Activation,
    x: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    inner: Float[Array, "E D F"],
    gate: Float[Array, "E D F"],
    outer: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """y_n = sum_j w_nj (act(x_n W_e) * (x_n V_e)) U_e over the k experts e = chosen_nj.

    Args:
      activation: by name, as in `FeedForward`.
      x: states.
      weights, chosen: of each token's experts.
      inner, gate, outer: W, V and U of every expert, of the states' dtype.
    """
    return grouped_experts(x, weights, chosen, inner, gate, outer, activation=activation)[0]


@partial(jax.jit, static_argnames="activation")
def grouped_experts(x, weights, chosen, inner, gate, outer, *, activation):
    """The result, and what the backward pass takes. FLOPs are counted by this name, a matrix of each stack a choice."""
    (n, d), k, f = x.shape, chosen.shape[1], inner.shape[-1]
    laid = plan(chosen, inner.shape[0])
    token = jnp.minimum(laid.choice // k, n - 1)

    def block(i, carry):
        e, here = laid.expert[i], x[_rows(token, i, laid.rows)]
        a, b = here @ inner[e], here @ gate[e]
        y = (ACTIVATIONS[activation](a) * b) @ outer[e]
        return tuple(_set(old, new, i) for old, new in zip(carry, (a, b, y), strict=True))

    empty = tuple(jnp.zeros((token.size, width), x.dtype) for width in (f, f, d))
    a, b, y = jax.lax.fori_loop(0, laid.used, block, empty)
    out = (y[laid.place].reshape(n, k, d) * weights[..., None]).sum(1).astype(x.dtype)
    return out, (laid, a, b)


def _forward(activation, x, weights, chosen, inner, gate, outer):
    out, kept = grouped_experts(x, weights, chosen, inner, gate, outer, activation=activation)
    return out, (x, weights, chosen, inner, gate, outer, kept)


def _backward(activation, kept, pull):
    return grouped_experts_backward(pull, *kept, activation=activation)


@partial(jax.jit, static_argnames="activation")
def grouped_experts_backward(pull, x, weights, chosen, inner, gate, outer, kept, *, activation):
    """The gradients; the results of the experts are not needed again, since <g, h U> = <g U', h>."""
    (n, d), k = x.shape, chosen.shape[1]
    laid, a, b = kept
    token = jnp.minimum(laid.choice // k, n - 1)
    # A row where no choice stands has no weight, and so adds nothing to a matrix.
    weight = jnp.append(weights.reshape(-1), 0)[laid.choice].astype(x.dtype)[:, None]
    add = lambda total, e, left, right: total.at[e].add(jnp.matmul(left.T, right, preferred_element_type=total.dtype))

    def block(i, carry):
        dx, dw, d_inner, d_gate, d_outer = carry
        e, tokens, rows = laid.expert[i], _rows(token, i, laid.rows), partial(_rows, i=i, rows=laid.rows)
        here, g, w, v = x[tokens], pull[tokens], rows(weight), rows(b)
        s, back = jax.vjp(ACTIVATIONS[activation], rows(a))
        h, dh = s * v, g @ outer[e].T
        dw = _set(dw, (dh * h).sum(-1, dtype=dw.dtype), i)
        dh = dh * w
        (da,), db = back(dh * v), dh * s
        dx = _set(dx, da @ inner[e].T + db @ gate[e].T, i)
        return dx, dw, add(d_inner, e, here, da), add(d_gate, e, here, db), add(d_outer, e, h * w, g)

    empty = (jnp.zeros((token.size, d), x.dtype), jnp.zeros((token.size,), weights.dtype))
    sums = [jnp.zeros(m.shape, jnp.promote_types(m.dtype, jnp.float32)) for m in (inner, gate, outer)]
    dx, dw, *sums = jax.lax.fori_loop(0, laid.used, block, (*empty, *sums))
    dx = dx[laid.place].reshape(n, k, d).sum(1)
    matrices = [total.astype(m.dtype) for total, m in zip(sums, (inner, gate, outer), strict=True)]
    return dx, dw[laid.place].reshape(n, k), None, *matrices


def _rows(x, i, rows):
    return jax.lax.dynamic_slice_in_dim(x, i * rows, rows)


def _set(x, new, i):
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[0], axis=0)


blocks.defvjp(_forward, _backward)
