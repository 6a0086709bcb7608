"""Linear attention with one decay a head, by chunks of tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import scanned, through, weights
from models.linear_attention.products import nn, nt, tn
from models.linear_attention.steady import steady
from partitioning import platform


def decayed(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, "#B #S H"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
    present: Bool[Array, "B S"] | None = None,
    *,
    chunk: int | None = None,
    chunks: int = 8,
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What `recurrence` computes, with matrix products inside a chunk and a state from chunk to chunk.

    o_i = sum_{j <= i} exp(g_{j+1} + .. + g_i) (q_i . k_j) v_j + exp(g_1 + .. + g_i) S_0^T q_i,  both over i's document only.

    Args:
      q, k, v: queries, keys and values; float32, bfloat16 or float64.
      log_decay: g, at most 0, for each token or, faster, once for all.
      resets: where a document begins.
      state: before the first token; float32, or float64 with such inputs.
      present: which tokens are there, all by default; the others do not decay the state, and their keys have to be 0.
      chunk, chunks: tokens of a chunk, 64 by default, and with one decay for all 32 or, on a TPU, 128; and chunks multiplied
        at once.

    Returns:
      The outputs in v's type, and the state behind the last token.

    Source: "Lightning Attention-2", Qin et al., 2024.
    Differs: documents packed in one row, any length, and decays that may differ by token.
    """
    if log_decay.shape[:2] == (1, 1):
        return steady(q, k, v, log_decay[0, 0], resets, state, present, chunk=chunk or _chunk(), chunks=chunks)
    decay = jnp.broadcast_to(log_decay, q.shape[:3]).astype(state.dtype)
    decay = decay if present is None else jnp.where(present[..., None], decay, 0)
    parts = {"q": q, "k": k, "v": v, "decay": decay, "resets": resets}
    return scanned(_block, state, parts, chunk=chunk or 64, chunks=chunks)


def _chunk() -> int:
    """A CPU multiplies small matrices; a TPU's compiled step with 32 waits for memory, with 128 for products."""
    return 128 if platform() == "tpu" else 32


def _block(state, part):
    q, k, v, wide = part["q"], part["k"], part["v"], state.dtype
    within, until = weights(part["decay"], part["resets"])
    scores = nt(q, k, wide) * within
    added = tn((k * within[..., -1, :, None]).astype(v.dtype), v, wide)
    before, state = through(state, until[..., -1, None, None], added)
    out, carried = nn(scores.astype(v.dtype), v, wide), nn(q.astype(wide), before, wide)
    return state, (out + until[..., None] * carried).astype(v.dtype)
