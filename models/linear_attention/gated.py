"""Gated linear attention: each feature of the keys decays by itself."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import LEAST, scanned


def gated(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, "#B #S H K"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    *,
    chunk: int = 8,
    chunks: int = 16,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `recurrence` computes with a decay for each feature of the keys; arguments as in `decayed`.

    o_i = sum_{j <= i} (sum_c q_ic k_jc exp(g_{j+1,c} + .. + g_ic)) v_j + S_0^T (exp(g_1 + .. + g_i) q_i).  Decays are not
    divided out, as where the two exponentials are one product's two sides: any gate is finite, and a chunk is short.

    Source: "Gated Linear Attention Transformers with Hardware-Efficient Training", Yang et al., 2023.
    Differs: no secondary chunks.
    """
    decay = jnp.broadcast_to(log_decay, q.shape).astype(state.dtype)
    parts = {"q": q, "k": k, "v": v, "decay": decay, "resets": resets}
    return scanned(_block, state, parts, chunk=chunk, chunks=chunks)


def _block(state, part):
    v, wide = part["v"], state.dtype
    q, k = (part[name].astype(wide) for name in "qk")
    size = q.shape[3]
    document = jnp.cumsum(part["resets"], axis=-1)[:, None]
    earlier = (document[..., :, None] == document[..., None, :]) & jnp.tri(size, k=-1, dtype=bool)
    long, rest = running(jnp.maximum(part["decay"], LEAST))
    apart = (long[..., :, None, :] - long[..., None, :, :]) + (rest[..., :, None, :] - rest[..., None, :, :])
    # A token's own key has not decayed: left out, its large and opposite parts of the gates' gradients are no noise there.
    within = jnp.exp(jnp.where(earlier[..., None], apart, -jnp.inf)) + jnp.eye(size, dtype=wide)[..., None]
    until = jnp.where((document == 0)[..., None], jnp.exp(long) * (1 + rest), 0)
    product = partial(jnp.einsum, preferred_element_type=wide)
    scores = (q[..., :, None, :] * k[..., None, :, :] * within).sum(-1)
    out = product("bhmij,bhmjv->bhmiv", scores.astype(v.dtype), v)
    added = product("bhmjk,bhmjv->bhmkv", (k * within[..., -1, :, :]).astype(v.dtype), v)
    before = []
    for m in range(q.shape[2]):
        before.append(state)
        state = until[:, :, m, -1, :, None] * state + added[:, :, m]
    carried = product("bhmik,bhmkv->bhmiv", until * q, jnp.stack(before, axis=2))
    return state, (out + carried).astype(v.dtype)


def running(g: Float[Array, "*B C K"]) -> tuple[Float[Array, "*B C K"], Float[Array, "*B C K"]]:
    """Sums of g over t <= i, and what rounding has left out of each: a difference of two long sums is exact with both."""
    total, lost = g[..., 0, :], jnp.zeros_like(g[..., 0, :])
    sums, rests = [total], [lost]
    for i in range(1, g.shape[-2]):
        term = g[..., i, :]
        new = total + term
        back = new - total
        lost = lost + jax.lax.stop_gradient((total - (new - back)) + (term - back))
        total = new
        sums.append(total)
        rests.append(lost)
    return jnp.stack(sums, axis=-2), jnp.stack(rests, axis=-2)
