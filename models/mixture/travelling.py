"""Experts shared out over devices: tokens travel to them, and results back; so do gradients, the other way."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from models.feed_forward import Activation
from models.mixture.blocks import grouped_experts, grouped_experts_backward
from models.mixture.exchange import back, slices, there
from models.mixture.ragged import sorted_rows, sorted_rows_backward

ARRIVED = "arrived"
"""What came to a device's experts, by the name that rematerialisation knows it by."""


def _blocks(x, weights, sizes, inner, gate, outer, *, activation, part):
    del part
    given = (x.reshape(len(x), -1), weights[:, None], _expert(x, sizes), inner, gate, outer)
    y, kept = grouped_experts(*given, activation=activation)
    return y.reshape(x.shape), kept


def _blocks_backward(pull, x, weights, sizes, inner, gate, outer, kept, *, activation, part):
    del part
    flat = lambda x: x.reshape(len(x), -1)
    given = (flat(pull), flat(x), weights[:, None], _expert(x, sizes), inner, gate, outer, kept)
    dx, dw, _, *matrices = grouped_experts_backward(*given, activation=activation)
    return dx.reshape(x.shape), dw[:, 0], *matrices


def _expert(x, sizes):
    """Of each row; behind the last one that is there it is one more than there are."""
    ends = jnp.cumsum(sizes)
    return jnp.searchsorted(ends, jnp.arange(len(x), dtype=ends.dtype), side="right").astype(jnp.int32)[:, None]


FORWARD: dict[str, Any] = {"blocks": _blocks, "ragged": sorted_rows}
BACKWARD: dict[str, Any] = {"blocks": _blocks_backward, "ragged": sorted_rows_backward}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def travelling(
    form: str,
    activation: Activation,
    axes: tuple[str, ...],
    x: Float[Array, "N D"],
    weights: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    inner: Float[Array, "L D F"],
    gate: Float[Array, "L D F"],
    outer: Float[Array, "L F D"],
) -> Float[Array, "N D"]:
    """What `blocks` and `ragged` compute, on each device for its tokens and with its experts.

    A choice travels: a state and its weight go to the expert's device, and its weighted result comes back; in the backward
    pass the result's gradient goes, and those of state and weight come back. A token with several experts on a device goes
    there several times. Called inside `on_each_device`.

    Args:
      form: 'blocks' or 'ragged'.
      activation: by name.
      axes: the mesh axes over which experts are shared out.
      x: states of this device's tokens.
      weights, chosen: of each token's experts, which are counted over all devices.
      inner, gate, outer: W, V and U of this device's experts.
    """
    return _run(form, activation, axes, x, weights, chosen, inner, gate, outer)[0]


def _run(form, activation, axes, x, weights, chosen, inner, gate, outer):
    """The result, and what the backward pass takes."""
    (n, d), k, flat = x.shape, chosen.shape[1], chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    table = slices(flat, len(inner) * jax.lax.axis_size(axes), axes)
    rows = checkpoint_name(there(_folded(x)[order // k], table, axes), ARRIVED)
    weight = checkpoint_name(there(weights.reshape(-1)[order], table, axes), ARRIVED)
    arrived = (rows, weight, table.arrived)
    y, kept = _room(FORWARD[form], activation, len(order), len(rows))(*arrived, inner, gate, outer)
    out = back(y, table, axes)[place].reshape(n, k, d).sum(1, dtype=weights.dtype).astype(x.dtype)
    return out, (weights, inner, gate, outer, order, place, table, arrived, kept)


def _backward(form, activation, axes, kept, pull):
    """The gradients; states have stayed where they came."""
    weights, inner, gate, outer, order, place, table, arrived, inside = kept
    (n, d), k = pull.shape, weights.shape[1]
    pulls = there(_folded(pull)[order // k], table, axes)
    run = _room(BACKWARD[form], activation, len(order), len(pulls))
    dx, dw, *matrices = run(pulls, *arrived, inner, gate, outer, inside)
    dx = back(dx, table, axes)[place].reshape(n, k, d).sum(1, dtype=weights.dtype).astype(pull.dtype)
    return dx, back(dw, table, axes)[place].reshape(n, k), None, *matrices


def _folded(x):
    """Rows of as many lines as numbers make 32 bits: so a TPU sends them, and a copy of all the room would reshape them."""
    lines = max(4 // x.dtype.itemsize, 1)
    return x.reshape(len(x), lines if x.shape[1] % lines == 0 else 1, -1)


def _room(function, activation, part, rows):
    """Jitted under a name by which FLOPs are counted: there is room for all devices' rows, and on average a part is there."""

    def run(*args):
        return function(*args, activation=activation, part=part)

    run.__name__ = f"room_for_{rows // part}"
    return jax.jit(run)


travelling.defvjp(_run, _backward)
