"""The chunked form with one decay a head as a kernel for TPUs: the state stays in the chip's fast memory along the row."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import LEAST
from models.linear_attention.decayed import decayed


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def kernel(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, "B S H"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    chunk: int = 128,
    interpret: bool = False,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `decayed` computes; the gradient is that form's own.

    A program takes a row and a head, chunk after chunk. Sums of decays between two tokens are a product of a triangle with
    the decays, so none is a difference of two long sums.

    Args:
      q, k, v, log_decay, resets, state: as in `decayed`.
      chunk: C, tokens that are multiplied at once.
      interpret: whether to run on what is there, slowly, and not on a TPU.

    Source: "Lightning Attention-2", Qin et al., 2024.
    Differs: as `decayed`.
    """
    rows, length, heads, size = q.shape
    count = -(-length // chunk)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
    heads_first = lambda x: pad(x).swapaxes(1, 2)
    decay = jnp.maximum(heads_first(log_decay), LEAST).astype(jnp.float32).reshape(rows, heads, count, 1, chunk)
    documents = jnp.cumsum(pad(resets).reshape(rows, count, 1, chunk), axis=-1, dtype=jnp.int32)
    width = v.shape[-1]
    tokens = lambda n: pl.BlockSpec((1, 1, chunk, n), lambda b, h, m: (b, h, m, 0))
    whole = pl.BlockSpec((1, 1, size, width), lambda b, h, m: (b, h, 0, 0))
    out, last = pl.pallas_call(
        _chunk,
        grid=(rows, heads, count),
        in_specs=[
            tokens(size),
            tokens(size),
            tokens(width),
            pl.BlockSpec((1, 1, 1, 1, chunk), lambda b, h, m: (b, h, m, 0, 0)),
            pl.BlockSpec((1, 1, 1, chunk), lambda b, h, m: (b, m, 0, 0)),
            whole,
        ],
        out_specs=[tokens(width), whole],
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads, count * chunk, width), v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((size, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(heads_first(q), heads_first(k), heads_first(v), decay, documents, state.astype(jnp.float32))
    return out.swapaxes(1, 2)[:, :length], last


def _chunk(q_ref, k_ref, v_ref, decay_ref, document_ref, state_ref, out_ref, last_ref, held_ref):
    """One chunk of one head; the state is in `held_ref` from chunk to chunk."""
    m = pl.program_id(2)

    @pl.when(m == 0)
    def _():
        held_ref[...] = state_ref[0, 0]

    q, k, v = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
    size = q.shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    # A vector over a chunk's tokens comes as a row; as a column it is the diagonal of its copies.
    upright = lambda x: jnp.where(row == column, jnp.broadcast_to(x, (size, size)), 0).sum(1, keepdims=True)
    exact = partial(jnp.dot, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    mixed = partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=_precision(q.dtype))
    product = lambda a, b, axes: mixed(a, b, ((axes[:1], axes[1:]), ((), ())))
    earlier = jnp.where(column <= row, jnp.broadcast_to(decay_ref[0, 0, 0], (size, size)), 0)
    between = exact(earlier, (row > column).astype(jnp.float32))
    document = document_ref[0, 0].astype(jnp.float32)
    same = (upright(document) == document) & (column <= row)
    within = jnp.where(same, jnp.exp(between), 0)
    until = jnp.where(upright(document) == 0, jnp.exp(earlier.sum(1, keepdims=True)), 0)
    state = held_ref[...]
    scores = (product(q, k, (1, 1)) * within).astype(v.dtype)
    carried = exact(q.astype(jnp.float32), state)
    out_ref[0, 0] = (product(scores, v, (1, 0)) + until * carried).astype(out_ref.dtype)
    left = (k * upright(within[size - 1 :]).astype(k.dtype)).astype(v.dtype)
    state = until[size - 1 :] * state + product(left, v, (0, 0))
    held_ref[...] = state
    last_ref[0, 0] = state


def _precision(dtype: Any) -> Any:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _forward(q, k, v, log_decay, resets, state, chunk, interpret):
    return kernel(q, k, v, log_decay, resets, state, chunk, interpret), (q, k, v, log_decay, resets, state)


def _backward(chunk, interpret, kept, pulls):
    q, k, v, log_decay, resets, state = kept
    form = lambda q, k, v, log_decay, state: decayed(q, k, v, log_decay, resets, state)
    *parts, state_pull = jax.vjp(form, q, k, v, log_decay, state)[1](pulls)
    return (*parts, None, state_pull)


kernel.defvjp(_forward, _backward)
