"""Linear attention of rows that are cut along their length: states go from device to device, tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.linear_attention.blocks import LEAST
from models.linear_attention.decayed import decayed
from models.linear_attention.delta import delta
from models.linear_attention.gated import gated
from partitioning import along

ROW = ("batch", "length", "heads")
# What a part of a row does to a state that comes in: outputs and last state with none, what each token reads of one, and
# how much of it is left behind the last token, a number for each feature of the keys or a matrix.
Effect = tuple[Array, Array, Array, Array]


def passed(
    form: str,
    parts: Sequence[Float[Array, ...]],
    resets: Bool[Array, "B S"],
    present: Bool[Array, "B S"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B S H V"], Float[Array, "B H K V"]]:
    """What the chunked form computes, for rows whose length the rules in scope cut.

    A device's part of a row maps the state S that comes in to T S + N, and its outputs are o + R S. All devices compute
    theirs at once, with S = 0, gather (T, N) of the parts of their row, [H K] or [H K K] and [H K V] numbers each, and find
    the state that comes to them.

    Args:
      form, parts, resets, present, state: as in `apply`.

    Source: "Linear Attention Sequence Parallelism", Sun et al., 2024.
    Differs: states are gathered, not sent from neighbour to neighbour; decays, borders of documents and the delta rule.
    """
    names = lambda x: (*(ROW[:2] if x.shape[:2] == resets.shape else (None, None)), "heads", *(None,) * (x.ndim - 3))
    arrays = [(x, names(x)) for x in parts]
    whole = ("batch", "heads", None, None)
    outputs = (*parts[0].shape[:3], state.shape[-1])
    return along(
        "length",
        lambda places, *given: _part(form, places, *given),
        [*arrays, (resets, ROW[:2]), (present, ROW[:2]), (state, whole)],
        [(outputs, (*ROW, None)), (state.shape, whole)],
    )


def _part(form: str, places: tuple[str, ...], *given: Array) -> tuple[Array, Array]:
    *parts, resets, present, state = given
    out, last, reads, left = EFFECTS[form](parts, resets, present, jnp.zeros_like(state))
    lasts, lefts = (jax.lax.all_gather(x, places) for x in (last, left))
    incoming = [state]
    for after, kept in zip(lasts, lefts, strict=True):
        before = incoming[-1]
        stays = kept[..., None] * before if kept.ndim < before.ndim else jnp.einsum("bhij,bhjv->bhiv", kept, before)
        incoming.append(stays + after)
    mine = jnp.stack(incoming)[jax.lax.axis_index(places)]
    wide = out.astype(state.dtype) + jnp.einsum("bshk,bhkv->bshv", reads, mine)
    return wide.astype(out.dtype), incoming[-1]


def _decayed(parts: Sequence[Array], resets: Array, present: Array, empty: Array) -> Effect:
    q, k, v, log_decay = parts
    decays = jnp.where(present[..., None], log_decay, 0)
    return _diagonal(decayed(q, k, v, log_decay, resets, empty, present), q, decays[..., None], resets, empty)


def _gated(parts: Sequence[Array], resets: Array, present: Array, empty: Array) -> Effect:
    del present
    q, k, v, log_decay = parts
    return _diagonal(gated(q, k, v, log_decay, resets, empty), q, log_decay, resets, empty)


def _diagonal(made: tuple[Array, Array], q: Array, log_decay: Array, resets: Array, empty: Array) -> Effect:
    """The effect of a form whose state decays by itself."""
    sums = jnp.cumsum(jnp.maximum(log_decay, LEAST).astype(empty.dtype), axis=1)
    first = (jnp.cumsum(resets, axis=1) == 0)[..., None, None]
    until = jnp.broadcast_to(jnp.where(first, jnp.exp(sums), 0), q.shape)
    return *made, until * q.astype(empty.dtype), until[:, -1]


def _delta(parts: Sequence[Array], resets: Array, present: Array, empty: Array) -> Effect:
    """The rule is linear in the state: with nothing to write, it makes of the identity what is left of any state."""
    del present
    q, k, v, rate, log_decay = parts
    size, width = empty.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=empty.dtype), (*empty.shape[:2], size, size))
    nothing = jnp.zeros((*v.shape[:3], size), v.dtype)
    out, last = delta(
        q, k, jnp.concatenate([v, nothing], -1), rate, log_decay, resets, jnp.concatenate([empty, identity], -1)
    )
    return out[..., :width], last[..., :width], out[..., width:].astype(empty.dtype), last[..., width:]


EFFECTS: dict[str, Callable[..., Effect]] = {"decayed": _decayed, "gated": _gated, "delta": _delta}
