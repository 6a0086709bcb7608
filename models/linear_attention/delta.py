"""The gated delta rule: a key's old value is taken out of the state before its new one goes in."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import scanned, weights
from models.linear_attention.products import nn, nt, tn


def delta(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    rate: Float[Array, "B S H"],
    log_decay: Float[Array, "#B #S H"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    *,
    chunk: int = 32,
    chunks: int = 8,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `delta_recurrence` computes, by chunks; arguments as there, chunk and chunks as in `decayed`.

    With u_i = b_i (v_i - exp(g_i) S_{i-1}^T k_i) the state is S_i = exp(g_i) S_{i-1} + k_i u_i^T. In a chunk the u solve
    (I + T) U = b (V - exp(g_1 + .. + g_i) K S_0),  T_ij = b_i exp(g_{j+1} + .. + g_i) k_i . k_j for j < i.

    Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule", Yang et al., 2024.
    Differs: nothing known.
    """
    decay = jnp.broadcast_to(log_decay, q.shape[:3]).astype(state.dtype)
    parts = {"q": q, "k": k, "v": v, "rate": rate.astype(state.dtype), "decay": decay, "resets": resets}
    return scanned(_block, state, parts, chunk=chunk, chunks=chunks)


def _block(state, part):
    wide = state.dtype
    q, k, v = (part[name].astype(wide) for name in "qkv")
    rate = part["rate"][..., None]
    within, until = weights(part["decay"], part["resets"])
    solve = unit_lower_inverse(rate * jnp.tril(within, -1) * nt(k, k, wide))
    fresh, reads = nn(solve, rate * v, wide), nn(solve, rate * until[..., None] * k, wide)
    kept = k * within[..., -1, :, None]
    before, written = [], []
    for m in range(q.shape[2]):
        before.append(state)
        written.append(fresh[:, :, m] - nn(reads[:, :, m], state, wide))
        state = until[:, :, m, -1, None, None] * state + tn(kept[:, :, m], written[-1], wide)
    out = nn(within * nt(q, k, wide), jnp.stack(written, axis=2), wide)
    out += until[..., None] * nn(q, jnp.stack(before, axis=2), wide)
    return state, out.astype(part["v"].dtype)


def unit_lower_inverse(below: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """(I + L)^-1 for a strictly lower L: blocks on the diagonal, inverted, of 1, 2, 4, .. rows, two of which make one by
    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].

    A series in powers of L would be shorter, and in float32 wrong: its terms grow where keys are alike.
    """
    size, wide = below.shape[-1], below.dtype
    whole = 1 << (size - 1).bit_length()
    lead = below.shape[:-2]
    below = jnp.pad(below, [(0, 0)] * len(lead) + [(0, whole - size)] * 2)
    inverse = jnp.ones((*lead, whole, 1, 1), below.dtype)
    half = 1
    while half < whole:
        pairs = below.reshape(*lead, whole // (2 * half), 2, half, whole // (2 * half), 2, half)
        corner = jnp.moveaxis(jnp.diagonal(pairs[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        first, last = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        above = jnp.zeros_like(first)
        inverse = jnp.concatenate(
            [
                jnp.concatenate([first, above], axis=-1),
                jnp.concatenate([-nn(nn(last, corner, wide), first, wide), last], axis=-1),
            ],
            axis=-2,
        )
        half *= 2
    return inverse[..., 0, :size, :size]
