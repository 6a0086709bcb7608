"""Cross-entropy over the vocabulary without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.heads import Scores
from partitioning import constrain, ways


class TokenLosses(NamedTuple):
    """What a pass over the vocabulary gives for each target.

    total: sum of weight * loss, the only part that carries a gradient.
    each: the loss of each target without its weight, `[B, K]`, no gradient.
    hit: 1 where the target has the highest score, `[B, K]`.
    """

    total: Float[Array, ""]
    each: Float[Array, "B K"]
    hit: Float[Array, "B K"]


def cross_entropy(
    scores: Scores,
    targets: Int[Array, "B K"],
    weight: Float[Array, "B K"],
    *,
    smoothing: float = 0.0,
    z: float = 0.0,
    tokens_per_chunk: int = 768,
) -> TokenLosses:
    """sum_i w_i [ logsumexp(s_i) - (1 - a) s_i,t - a mean(s_i) + z logsumexp(s_i)^2 ], in chunks of targets.

    The gradient is computed in the forward pass, chunk by chunk: three matrix products instead of four, and never more
    than one chunk's logits in memory. Chunks cut the second dimension, so that rows stay where they are sharded; where that is
    cut over devices too, a chunk takes some targets of each part.

    Args:
      scores: hidden states `[B, K, D]`, table and bias.
      targets: token ids, `[B, K]`.
      weight: of each target; carries no gradient.
      smoothing: a, the share of the target's probability that goes to all tokens evenly.
      z: coefficient of the squared normaliser.
      tokens_per_chunk: about how many targets' logits a device holds at once.
    """
    rows, length = targets.shape
    cuts = _cuts(rows, length, tokens_per_chunk)
    total, each, hit = _chunked(
        scores.hidden, scores.table, scores.bias, weight, targets, scores.size, float(smoothing), float(z), cuts
    )
    return TokenLosses(total, each, hit)


class Cuts(NamedTuple):
    """How targets are chunked: parts of a row that lie on different devices, and targets of each part in a chunk."""

    parts: int
    per_part: int


def _cuts(rows: int, length: int, tokens: int) -> Cuts:
    """As few chunks as the limit allows, all of one size, with little padding.

    The limit is a device's: after every chunk the devices that share the rows add their gradients of the table up.
    """
    parts = ways("length")
    length = -(-length // parts)
    most = max(1, min(length, tokens * ways("batch") // max(rows, 1)))
    return Cuts(parts, -(-length // -(-length // most)))


def _chunk_terms(hidden, table, bias, weight, targets, size, smoothing, z):
    """One chunk of tokens [T, D]: losses, hits and d(sum w loss)/d logits."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("td,vd->tv", hidden, table, preferred_element_type=wide)
    logits = logits if bias is None else logits + bias
    if table.shape[0] != size:
        logits = jnp.where(jnp.arange(table.shape[0]) < size, logits, -1e30)
    top = logits.max(-1)
    lse = jnp.log(jnp.exp(logits - top[:, None]).sum(-1)) + top
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    each = lse - target
    hit = (target >= top).astype(wide)
    pull = (jnp.arange(table.shape[0]) == targets[:, None]).astype(wide)
    if smoothing:
        real = jnp.arange(table.shape[0]) < size
        each = each + smoothing * (target - jnp.where(real, logits, 0).sum(-1) / size)
        pull = (1 - smoothing) * pull + smoothing * real / size
    # The powers again and not those of the sum: a pass over the logits in place instead of one more array of their size.
    push = jnp.exp(logits - lse[:, None])
    push = push * (1 + 2 * z * lse)[:, None] if z else push
    each = each + z * jnp.square(lse) if z else each
    return each, hit, (push - pull) * weight[:, None].astype(wide)


def _split(x, cuts):
    """[B, K, ...] -> [chunks, parts B per_part, ...], padded with zeros; a part stays on its devices."""
    x = constrain(_padded(x, 1, cuts.parts), "batch", "length", *(None,) * (x.ndim - 2))
    x = _padded(x.reshape(x.shape[0], cuts.parts, -1, *x.shape[2:]), 2, cuts.per_part)
    x = x.reshape(*x.shape[:2], -1, cuts.per_part, *x.shape[3:])
    chunks = x.transpose(2, 1, 0, *range(3, x.ndim))
    return chunks.reshape(chunks.shape[0], -1, *x.shape[4:])


def _join(x, shape, cuts):
    """The inverse of `_split`, for a shape [B, K]."""
    rows, length = shape
    x = x.reshape(x.shape[0], cuts.parts, rows, -1, *x.shape[2:])
    x = x.transpose(2, 1, 0, *range(3, x.ndim))
    x = x.reshape(rows, cuts.parts, -1, *x.shape[4:])[:, :, : -(-length // cuts.parts)]
    return x.reshape(rows, -1, *x.shape[3:])[:, :length]


def _padded(x, axis, multiple):
    pad = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)]) if pad else x


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _chunked(hidden, table, bias, weight, targets, size, smoothing, z, cuts):
    def one(total, chunk):
        h, t, w = chunk
        each, hit, _ = _chunk_terms(h, table, bias, w, t, size, smoothing, z)
        return total + (each * w).sum(), (each, hit)

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    chunks = (_split(hidden, cuts), _split(targets, cuts), _split(weight.astype(wide), cuts))
    total, (each, hit) = jax.lax.scan(one, jnp.zeros((), wide), chunks)
    return total, _join(each, targets.shape, cuts), _join(hit, targets.shape, cuts)


def _forward(hidden, table, bias, weight, targets, size, smoothing, z, cuts):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def one(carry, chunk):
        total, d_table, d_bias = carry
        h, t, w = chunk
        each, hit, d_logits = _chunk_terms(h, table, bias, w, t, size, smoothing, z)
        small = d_logits.astype(h.dtype)
        d_hidden = small @ table
        # As [D, V]: the logits are then read as they lie, where a product to [V, D] transposes them first.
        d_table = d_table + jnp.einsum("td,tv->dv", h, small, preferred_element_type=wide)
        d_bias = None if d_bias is None else d_bias + d_logits.sum(0)
        return (total + (each * w).sum(), d_table, d_bias), (each, hit, d_hidden)

    start = (
        jnp.zeros((), wide),
        jnp.zeros(table.shape[::-1], wide),
        None if bias is None else jnp.zeros(bias.shape, wide),
    )
    chunks = (_split(hidden, cuts), _split(targets, cuts), _split(weight.astype(wide), cuts))
    (total, d_table, d_bias), (each, hit, d_hidden) = jax.lax.scan(one, start, chunks)
    d_bias = None if bias is None or d_bias is None else d_bias.astype(bias.dtype)
    saved = (
        _join(d_hidden, targets.shape, cuts),
        d_table.T.astype(table.dtype),
        d_bias,
        jnp.zeros(weight.shape, weight.dtype),
    )
    return (total, _join(each, targets.shape, cuts), _join(hit, targets.shape, cuts)), saved


def _backward(size, smoothing, z, cuts, saved, cotangents):
    d_hidden, d_table, d_bias, d_weight = saved
    g = cotangents[0]
    scale = lambda x: None if x is None else (x * g).astype(x.dtype)
    return scale(d_hidden), scale(d_table), scale(d_bias), d_weight, None


_chunked.defvjp(_forward, _backward)


def in_chunks(
    one: Callable[..., Float[Array, T * F]], hidden: Float[Array, "B K D"], *by_target: Array, tokens_per_chunk: int
) -> Float[Array, "B K *F"]:
    """Applies a function of (hidden, *by_target) to chunks of targets, which the backward pass computes again.

    Args:
      one: from `[T, D]` and `[T]` arrays to numbers for each target; may hold `[T, vocab]` inside.
      hidden: states at the targets.
      by_target: arrays `[B, K]`.
      tokens_per_chunk: about how many targets are in one chunk on one device.
    """
    rows, length = hidden.shape[:2]
    cuts = _cuts(rows, length, tokens_per_chunk)
    chunks = tuple(_split(x, cuts) for x in (hidden, *by_target))
    body = jax.checkpoint(lambda _, chunk: (None, one(*chunk)), prevent_cse=False)
    return _join(jax.lax.scan(body, None, chunks)[1], (rows, length), cuts)


def log_probabilities(
    scores: Scores, targets: Int[Array, "B K"], *, tokens_per_chunk: int = 768
) -> Float[Array, "B K"]:
    """log p(target) for each target, each with its gradient.

    For losses that are not a weighted sum over tokens, such as those of whole sequences. One matrix product more than
    `cross_entropy`.

    Args:
      scores: hidden states `[B, K, D]`, table and bias.
      targets: token ids.
      tokens_per_chunk: about how many targets' logits a device holds at once.
    """

    def one(hidden, target):
        logits = replace(scores, hidden=hidden).logits()
        return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)

    return in_chunks(one, scores.hidden, targets, tokens_per_chunk=tokens_per_chunk)
