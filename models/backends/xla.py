"""The product in plain XLA, for every mask and on every platform."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.backends.view import View, over_heads
from models.few_rows import by_kernel, kernels, rows

HIDDEN = -1e30
"""The score of a key that is not seen, far below any other."""


def xla(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """The product for training: scores in float32 whatever the inputs; of the weights one array is kept for the gradient."""
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    if q.shape[1] == 1 and (kernels() or (k.shape[2] < q.shape[2] and bias is None)):
        return _of_one_slot(q, k, v, view, bias)
    k, v = over_heads(k, q.shape[2]), over_heads(v, q.shape[2])
    q, k, v = heads_first(q * q.shape[-1] ** -0.5), heads_first(k), heads_first(v)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=wide)
    scores = scores if bias is None else scores + bias.astype(wide)
    weights = masked_softmax(scores, view.visible[:, None]).astype(v.dtype)
    return jnp.einsum("bhqs,bhsk->bhqk", weights, v, preferred_element_type=wide).astype(v.dtype).transpose(0, 2, 1, 3)


def _of_one_slot(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H 1 S"] | None,
) -> Float[Array, "B 1 H K"]:
    """All that a group asks at one slot, as several queries of one head: keys are read once, not repeated.

    Keys and values are turned to how a cache has them, so that decoding reads them where they are. The mask is looked at
    once, and the sum divides what was mixed, which is smaller than the weights. Slots behind the last one that is seen, which
    a cache has not filled yet, are not read by kernels.
    """
    asked = q.reshape(len(q), k.shape[2], -1, q.shape[3]) * q.shape[-1] ** -0.5
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Constants, and so the same for all layers: XLA would carry what each computes around a loop over tokens.
    slots = jnp.where(view.visible, np.arange(1, k.shape[1] + 1, dtype=np.int32), 0).max()
    scores = _each(asked, k.transpose(0, 2, 3, 1), wide, columns=slots)
    if bias is not None:
        groups = k.shape[2] if bias.shape[1] > 1 else 1
        scores = scores + bias.reshape(len(bias), groups, -1, bias.shape[3]).astype(wide)
    scores = jnp.where(view.visible[:, None], scores, HIDDEN)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    powers = jnp.exp(scores - largest)
    mixed = _each(powers.astype(v.dtype), v.transpose(0, 2, 1, 3), wide, lines=slots)
    # A query that sees nothing has a power of 1 for every key.
    share = jnp.where(largest > HIDDEN, 1 / powers.sum(-1, keepdims=True), 0.0)
    return (mixed * share).astype(v.dtype).reshape(q.shape)


def _each(
    x: Float[Array, "B G N D"], matrix: Float[Array, "B G D F"], wide: jnp.dtype, **used: Int[Array, ""]
) -> Float[Array, "B G N F"]:
    if by_kernel(x, matrix):
        return rows(x, matrix, **used)
    return jnp.einsum("bgnd,bgdf->bgnf", x, matrix, preferred_element_type=wide)


@jax.custom_jvp
def masked_softmax(scores: Float[Array, "B H Q S"], visible: Bool[Array, "B 1 Q S"]) -> Float[Array, "B H Q S"]:
    """Softmax over the visible keys, 0 elsewhere; a query that sees nothing gets 0 everywhere."""
    scores = jnp.where(visible, scores, HIDDEN)
    powers = jnp.where(visible, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = powers.sum(-1, keepdims=True)
    return powers * (1 / jnp.where(total > 0, total, 1.0))


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    # By the chain rule four arrays of this size would be kept, and the mask three times; the weights are all it takes.
    weights = masked_softmax(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)
