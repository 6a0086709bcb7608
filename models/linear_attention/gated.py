"""Gated linear attention: each feature of the keys decays by itself."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.linear_attention.blocks import scanned, through
from models.linear_attention.products import nn, nt, tn

# Tokens whose scores at all levels are one product each; fewer tokens make products too small, more waste most of them.
BASE = 8


def gated(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, "#B #S H K"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    *,
    chunk: int = 32,
    chunks: int = 8,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `recurrence` computes with a decay for each feature of the keys; arguments as in `decayed`.

    o_i = sum_{j <= i} (sum_c q_ic k_jc exp(g_{j+1,c} + .. + g_ic)) v_j + S_0^T (exp(g_1 + .. + g_i) q_i).

    The sum over j goes by levels of a binary tree: i and j are in the two halves of one block of 2, 4, 8, .. tokens, and
    exp(g_{j+1} + .. + g_i) is what is left from j to the end of the first half times what is left from there to i. So it is
    a product of two sides, for matrix products, and both sides are products of decays: nothing is divided out, no sum of
    gates is subtracted from another, any gate is finite and exact.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", Yang et al., 2023.
    Differs: levels of a tree where the paper has two, chunks and smaller chunks with gates multiplied out in the smaller.
    """
    decay = jnp.broadcast_to(log_decay, q.shape).astype(state.dtype)
    parts = {"q": q, "k": k, "v": v, "decay": decay, "resets": resets}
    return scanned(_block, state, parts, chunk=chunk, chunks=chunks)


def _block(state, part):
    v, wide = part["v"], state.dtype
    document = jnp.cumsum(part["resets"], axis=-1)[:, None]
    out, read, kept, until = inside(part["q"], part["k"], v, part["decay"], document)
    read = jnp.where((document == 0)[..., None], read, 0)
    kept = jnp.where((document == document[..., -1:])[..., None], kept, 0)
    until = jnp.where(document[..., -1:] == 0, until, 0)
    added = tn(kept.astype(v.dtype), v, wide)
    before, state = through(state, until[..., None], added)
    carried = nn(read, before, wide)
    return state, (out + carried).astype(v.dtype)


def inside(
    q: Float[Array, "B H M C K"],
    k: Float[Array, "B H M C K"],
    v: Float[Array, "B H M C V"],
    g: Float[Array, "B H M C K"],
    document: Int[Array, "B 1 M C"],
) -> tuple[Float[Array, "B H M C V"], Float[Array, "B H M C K"], Float[Array, "B H M C K"], Float[Array, "B H M K"]]:
    """What the queries of each chunk read of its own keys, and what its surroundings need of it.

    Args:
      q, k, v, g: of the chunks; log decays g.
      document: tokens of different ones do not see each other.

    Returns:
      The outputs; the queries, decayed since the chunk began; the keys, decayed until it ends; what is left of a state
      after all of it.
    """
    size = q.shape[3]
    whole = 1 << (size - 1).bit_length()
    if whole > size:
        filled = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, whole - size)] + [(0, 0)] * (x.ndim - 4))
        q, k, v, g, document = (filled(x) for x in (q, k, v, g, document))
    (rows, heads, chunks, _, width), wide = q.shape, g.dtype
    low = lambda x: x.astype(q.dtype)
    base, half = min(BASE, whole), 1
    # All chunks behind each other, in pieces of the size at hand; the axes behind the heads.
    cut = lambda x, *sizes: x.reshape(*x.shape[:2], -1, *sizes, x.shape[-1])
    reads, keeps = cut(q).astype(wide) * jnp.exp(cut(g)), cut(k).astype(wide)
    left = cut(jnp.exp(g), 1)
    index = jnp.arange(base)
    own = nt(cut(q, base), cut(k, base), wide)
    scores = jnp.where(index[:, None] == index, own, 0)
    while half < base:
        block, last = index // (2 * half), index // half % 2 == 1
        pairs = (block[:, None] == block) & last[:, None] & ~last
        scores += jnp.where(pairs, nt(cut(low(reads), base), cut(low(keeps), base), wide), 0)
        reads, keeps, left = _joined(reads, keeps, left, half)
        half *= 2
    seen = document.reshape(rows, 1, -1, base)
    scores = jnp.where(seen[..., :, None] == seen[..., None, :], scores, 0)
    out = nn(low(scores), cut(v, base), wide)
    while half < whole:
        seen = document.reshape(rows, 1, -1, 2, half)
        last, first = cut(low(reads), 2, half)[:, :, :, 1], cut(low(keeps), 2, half)[:, :, :, 0]
        scores = nt(last, first, wide)
        scores = jnp.where(seen[:, :, :, 1, :, None] == seen[:, :, :, 0, None, :], scores, 0)
        found = nn(low(scores), cut(v, 2, half)[:, :, :, 0], wide)
        out += jnp.pad(found[:, :, :, None], [(0, 0)] * 3 + [(1, 0), (0, 0), (0, 0)]).reshape(out.shape)
        reads, keeps, left = _joined(reads, keeps, left, half)
        half *= 2
    back = lambda x: x.reshape(rows, heads, chunks, whole, -1)[:, :, :, :size]
    return back(out), back(reads), back(keeps), left.reshape(rows, heads, chunks, width)


def _joined(reads, keeps, left, half):
    """From blocks of `half` tokens to blocks of twice as many: reads since a block began, keeps until it ends."""
    pairs = lambda x: x.reshape(*x.shape[:2], -1, 2, half, x.shape[-1])
    left = left.reshape(*left.shape[:2], -1, 2, 1, left.shape[-1])
    first, last = left[:, :, :, 0], left[:, :, :, 1]
    joined = (times(1, pairs(reads), first), times(0, pairs(keeps), last))
    return *(x.reshape(reads.shape) for x in joined), first * last


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def times(side: int, x: Float[Array, "B H N 2 C K"], factor: Float[Array, "B H N 1 K"]) -> Float[Array, "B H N 2 C K"]:
    """One half of each block times a factor.

    The factor's gradient is a sum over few tokens, which by the chain rule XLA for CPU hands to a library: half of the whole
    backward pass went there. Added up in halves, it is part of a loop.
    """
    chosen = (jnp.arange(2) == side)[:, None, None]
    return x * jnp.where(chosen, factor[:, :, :, None], 1)


def _times_forward(side, x, factor):
    return times(side, x, factor), (x, factor)


def _times_backward(side, kept, slope):
    x, factor = kept
    terms = slope[:, :, :, side] * x[:, :, :, side]
    while terms.shape[3] > 1:
        terms = terms[:, :, :, : terms.shape[3] // 2] + terms[:, :, :, terms.shape[3] // 2 :]
    return times(side, slope, factor), terms


times.defvjp(_times_forward, _times_backward)
