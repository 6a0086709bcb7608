"""Linear attention token by token: what the chunked forms equal, and how decoding goes on."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def recurrence(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    log_decay: Float[Array, "#B #S H #K"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, S_{t-1} = 0 where a document begins.

    Args:
      q, k, v: queries, keys and values.
      log_decay: g, at most 0: one a head, or one a feature of the keys, for all tokens or for each.
      resets: where a document begins.
      state: before the first token.

    Returns:
      The outputs, and the state behind the last token.
    """

    def step(state, now):
        q, k, v, g, reset = now
        decay = jnp.where(reset[:, None, None], 0, jnp.exp(g))
        state = decay[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, _read(state, q)

    g = jnp.broadcast_to(log_decay, (*q.shape[:3], log_decay.shape[-1])).astype(state.dtype)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, g, resets)))
    return out.swapaxes(0, 1), state


def delta_recurrence(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    rate: Float[Array, "B S H"],
    log_decay: Float[Array, "#B #S H"],
    resets: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """S_t = D_t + b_t k_t (v_t - D_t^T k_t)^T, D_t = exp(g_t) S_{t-1}, o_t = S_t^T q_t; arguments as in `recurrence`.

    Args:
      rate: b, how much of what the state says of a key is replaced by its value.
    """

    def step(state, now):
        q, k, v, b, g, reset = now
        state = jnp.where(reset[:, None], 0, jnp.exp(g))[..., None, None] * state
        said = _read(state, k)
        state = state + (b[..., None] * k)[..., None] * (v - said)[..., None, :]
        return state, _read(state, q)

    g = jnp.broadcast_to(log_decay, q.shape[:3]).astype(state.dtype)
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, rate, g, resets)))
    return out.swapaxes(0, 1), state


def _read(state: Float[Array, "B H K V"], key: Float[Array, "B H K"]) -> Float[Array, "B H V"]:
    """S^T k as one product of matrices: on a CPU a sum over products takes 25 times as long."""
    return jnp.einsum("bhk,bhkv->bhv", key, state, precision="highest")
