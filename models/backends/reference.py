"""The formula as written on paper, for tests and for those who look at the weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.backends.view import View, over_heads


def reference(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """softmax(q kT / sqrt(K) + bias) v over the visible keys, written as on paper; a query that sees nothing gets 0."""
    return jnp.einsum("bhqs,bshk->bqhk", reference_weights(q, k, view.visible, bias), over_heads(v, q.shape[2]))


def reference_weights(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    visible: Bool[Array, "B Q S"],
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B H Q S"]:
    """softmax(q kT / sqrt(K) + bias) over the visible keys."""
    scores = jnp.einsum("bqhk,bshk->bhqs", q, over_heads(k, q.shape[2])) / jnp.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    seen = visible[:, None]
    # Set before the exponential: of a key that is not seen it could be infinite, and its derivative 0 * infinity.
    scores = jnp.where(seen, scores, -1e30)
    # The largest cancels, so it needs no derivative; with one, scores that the compiler rounds twice in two ways are lost.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(scores - largest), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)
