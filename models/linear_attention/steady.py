"""Linear attention whose decays are the same for all tokens: powers by distance, and a gradient written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import LEAST, across, blocked, through, turned, unblocked, unturned


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
    product = partial(jnp.einsum, preferred_element_type=g.dtype)

    def block(state, part):
        q, k, v = (turned(x) for x in part[:3])
        far = _Decays(g, *part[3:])
        scores = product("bhmik,bhmjk->bhmij", q, k) * far.within
        out = product("bhmij,bhmjv->bhmiv", scores.astype(v.dtype), v)
        before, after = _states(state, k, v, far)
        out = out + far.until * product("bhmik,bhmkv->bhmiv", q.astype(g.dtype), before)
        return after, (unturned(out.astype(v.dtype)), state)

    parts = [blocked(x, chunk, chunks) for x in (q, k, v, resets, present)]
    last, (out, states) = jax.lax.scan(block, state, parts)
    return (unblocked(out, q.shape[1]), last), (q, k, v, g, resets, present, states)


def _backward(chunk, chunks, kept, slopes):
    q, k, v, g, resets, present, states = kept
    product = partial(jnp.einsum, preferred_element_type=g.dtype)

    def block(carry, part):
        d_state, d_g = carry
        q, k, v, d_out = (turned(x) for x in part[:4])
        far = _Decays(g, *part[4:-1])
        before, _ = _states(part[-1], k, v, far)
        low, wide = lambda x: x.astype(v.dtype), lambda x: x.astype(g.dtype)
        scores = product("bhmik,bhmjk->bhmij", q, k) * far.within
        d_scores = product("bhmiv,bhmjv->bhmij", d_out, v)
        read = product("bhmki,bhmiv->bhmkv", across(low(far.until * q)), d_out)
        after, d_state = through(d_state, far.whole, read, back=True)
        q_far = far.until * product("bhmiv,bhmkv->bhmik", wide(d_out), before)
        k_far = far.left * product("bhmjv,bhmkv->bhmjk", wide(v), after)
        v_far = far.left * product("bhmjk,bhmkv->bhmjv", wide(k), after)
        # Each power is d exp(g n) / dg = n exp(g n).
        for n, x in (
            (far.apart, scores * d_scores),
            (far.place, (q * q_far).sum(-1, keepdims=True)),
            (far.behind, (k * k_far).sum(-1, keepdims=True)),
            (far.size, far.whole * (before * after).sum((-2, -1), keepdims=True)),
        ):
            d_g = d_g + (n * x).sum((0, 2, 3, 4))
        d_scores = low(d_scores * far.within)
        d_q = product("bhmij,bhmjk->bhmik", d_scores, k) + q_far
        d_k = product("bhmji,bhmik->bhmjk", across(d_scores), q) + k_far
        d_v = product("bhmji,bhmiv->bhmjv", across(low(scores)), d_out) + v_far
        return (d_state, d_g), tuple(unturned(x.astype(y.dtype)) for x, y in ((d_q, q), (d_k, k), (d_v, v)))

    d_out, d_last = slopes
    parts = [blocked(x, chunk, chunks) for x in (q, k, v, d_out, resets, present)]
    (d_state, d_g), found = jax.lax.scan(block, (d_last, jnp.zeros_like(g)), (*parts, states), reverse=True)
    return *(unblocked(x, q.shape[1]) for x in found), d_g, d_state, None, None


_steady.defvjp(_forward, _backward)


def _states(state, k, v, far):
    """Before each chunk of a block, and behind the block."""
    added = jnp.einsum(
        "bhmkj,bhmjv->bhmkv", across((far.left * k).astype(v.dtype)), v, preferred_element_type=state.dtype
    )
    return through(state, far.whole, added)


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
