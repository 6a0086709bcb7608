"""Linear attention whose decays are the same for all tokens: powers by distance, and a gradient written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import LEAST, cut, joined, through, turned, unturned
from models.linear_attention.products import nn, nt, tn


def steady(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, H],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    present: Bool[Array, "B S"] | None = None,
    *,
    chunk: int,
    chunks: int,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `decayed` computes where one g is every token's: exp(g_{j+1} + .. + g_i) = exp(g n), n the tokens from j to i.

    Autodiff would keep or compute again what the gradient has no use for; here a block keeps the state before it.

    Args:
      q, k, v, resets, state: as in `decayed`.
      log_decay: g of each head, at most 0.
      present: as in `decayed`; the others are no distance.
      chunk, chunks: as in `decayed`.

    Source: "Lightning Attention-2", Qin et al., 2024.
    Differs: as `decayed`.
    """
    g = jnp.maximum(log_decay, LEAST).astype(state.dtype)
    present = jnp.ones_like(resets) if present is None else present
    return _steady(q, k, v, g, state, resets, present, chunk, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _steady(q, k, v, g, state, resets, present, chunk, chunks):
    return _forward(q, k, v, g, state, resets, present, chunk, chunks)[0]


def _forward(q, k, v, g, state, resets, present, chunk, chunks):
    wide = g.dtype

    parts = [cut(x, chunk, chunks) for x in (q, k, v, resets, present)]

    def block(carry, i):
        state, outs = carry
        q, k, v, *borders = (turned(x[:, i]) for x in parts)
        far = _Decays(g, *borders)
        scores = nt(q, k, wide) * far.within
        out = nn(scores.astype(v.dtype), v, wide)
        before, after = _states(state, k, v, far)
        out = out + far.until * nn(q.astype(wide), before, wide)
        return (after, outs.at[:, i].set(unturned(out.astype(v.dtype)))), state

    empty = jnp.zeros_like(parts[2])
    (last, out), states = jax.lax.scan(block, (state, empty), jnp.arange(empty.shape[1]))
    return (joined(out, v.shape[1]), last), (q, k, v, g, resets, present, states)


def _backward(chunk, chunks, kept, slopes):
    q, k, v, g, resets, present, states = kept
    wide = g.dtype

    d_out, d_last = slopes
    parts = [cut(x, chunk, chunks) for x in (q, k, v, d_out, resets, present)]

    def block(carry, now):
        d_state, d_g, found = carry
        i, state = now
        q, k, v, d_out, *borders = (turned(x[:, i]) for x in parts)
        far = _Decays(g, *borders)
        before, _ = _states(state, k, v, far)
        low = lambda x: x.astype(v.dtype)
        scores = nt(q, k, wide) * far.within
        d_scores = nt(d_out, v, wide)
        read = tn(low(far.until * q), d_out, wide)
        after, d_state = through(d_state, far.whole, read, back=True)
        q_far = far.until * nt(d_out.astype(wide), before, wide)
        k_far = far.left * nt(v.astype(wide), after, wide)
        v_far = far.left * nn(k.astype(wide), after, wide)
        # Each power is d exp(g n) / dg = n exp(g n).
        for n, x in (
            (far.apart, scores * d_scores),
            (far.place, (q * q_far).sum(-1, keepdims=True)),
            (far.behind, (k * k_far).sum(-1, keepdims=True)),
            (far.size, far.whole * (before * after).sum((-2, -1), keepdims=True)),
        ):
            d_g = d_g + (n * x).sum((0, 2, 3, 4))
        d_scores = low(d_scores * far.within)
        d_q = nn(d_scores, k, wide) + q_far
        d_k = tn(d_scores, q, wide) + k_far
        d_v = tn(low(scores), d_out, wide) + v_far
        found = [x.at[:, i].set(unturned(new.astype(x.dtype))) for x, new in zip(found, (d_q, d_k, d_v), strict=True)]
        return (d_state, d_g, found), None

    empty = [jnp.zeros_like(x) for x in parts[:3]]
    carry, order = (d_last, jnp.zeros_like(g), empty), jnp.arange(parts[0].shape[1])
    (d_state, d_g, found), _ = jax.lax.scan(block, carry, (order, states), reverse=True)
    return *(joined(x, q.shape[1]) for x in found), d_g, d_state, None, None


_steady.defvjp(_forward, _backward)


def _states(state, k, v, far):
    """Before each chunk of a block, and behind the block."""
    return through(state, far.whole, tn((far.left * k).astype(v.dtype), v, state.dtype))


class _Decays:
    """The powers that a block's chunks need, 0 across a border of documents, and their exponents, as [B, H, M, C, C],
    [B, H, M, C, 1] or [B, H, M, 1, 1]."""

    def __init__(self, g: Float[Array, H], resets: Bool[Array, "B M C"], present: Bool[Array, "B M C"]):
        document = jnp.cumsum(resets, axis=-1)[:, None, ..., None]
        place = jnp.cumsum(present, axis=-1)[:, None, ..., None]
        turn = lambda x: x.swapaxes(-1, -2)
        seen = (document == turn(document)) & jnp.tri(resets.shape[-1], dtype=bool)
        power: Any = lambda n, where: jnp.where(where, jnp.exp(g[:, None, None, None] * n), 0)
        first, self.size = document == 0, place[..., -1:, :]
        self.place, self.apart, self.behind = place, place - turn(place), self.size - place
        self.within, self.until = power(self.apart, seen), power(place, first)
        self.left = power(self.behind, document == document[..., -1:, :])
        self.whole = self.until[..., -1:, :]
