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

FORWARD: dict[str, Any] = {"blocks": grouped_experts, "ragged": sorted_rows}
BACKWARD: dict[str, Any] = {"blocks": grouped_experts_backward, "ragged": sorted_rows_backward}


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
    return exchanged_experts(x, weights, chosen, inner, gate, outer, form=form, activation=activation, axes=axes)[0]


@partial(jax.jit, static_argnames=("form", "activation", "axes"))
def exchanged_experts(x, weights, chosen, inner, gate, outer, *, form, activation, axes):
    """The result, and what the backward pass takes. FLOPs are counted by this name, a matrix of each stack a choice."""
    (n, d), k, flat = x.shape, chosen.shape[1], chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
    table = slices(flat, len(inner) * jax.lax.axis_size(axes), axes)
    rows = checkpoint_name(there(x[order // k], table, axes), ARRIVED)
    weight = checkpoint_name(there(weights.reshape(-1)[order], table, axes), ARRIVED)[:, None]
    # Behind the last row that came the expert is one more than there are.
    ends = jnp.cumsum(table.arrived)
    expert = jnp.searchsorted(ends, jnp.arange(len(rows), dtype=ends.dtype), side="right").astype(jnp.int32)[:, None]
    y, kept = FORWARD[form](rows, weight, expert, inner, gate, outer, activation=activation)
    out = back(y, table, axes)[place].reshape(n, k, d).sum(1, dtype=weights.dtype).astype(x.dtype)
    return out, (order, place, table, (rows, weight, expert), kept)


def _forward(form, activation, axes, x, weights, chosen, inner, gate, outer):
    out, kept = exchanged_experts(x, weights, chosen, inner, gate, outer, form=form, activation=activation, axes=axes)
    return out, (weights, chosen, inner, gate, outer, kept)


def _backward(form, activation, axes, kept, pull):
    return exchanged_experts_backward(pull, *kept, form=form, activation=activation, axes=axes)


@partial(jax.jit, static_argnames=("form", "activation", "axes"))
def exchanged_experts_backward(pull, weights, chosen, inner, gate, outer, kept, *, form, activation, axes):
    """The gradients; states have stayed where they came."""
    (n, d), k = pull.shape, chosen.shape[1]
    order, place, table, arrived, inside = kept
    pulls = there(pull[order // k], table, axes)
    dx, dw, _, *matrices = BACKWARD[form](pulls, *arrived, inner, gate, outer, inside, activation=activation)
    dx = back(dx, table, axes)[place].reshape(n, k, d).sum(1, dtype=weights.dtype).astype(pull.dtype)
    return dx, back(dw[:, 0], table, axes)[place].reshape(n, k), None, *matrices


travelling.defvjp(_forward, _backward)
