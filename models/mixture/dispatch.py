"""Ways to run experts on the tokens that chose them, behind one call; all but `capacity` drop none and equal `dense`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.feed_forward import ACTIVATIONS, Activation
from models.mixture.blocks import blocks
from models.mixture.ragged import ragged
from models.mixture.travelling import travelling
from partitioning import UserError, cuts, on_each_device, platform

Form = Literal["blocks", "ragged", "dense", "capacity"]
Matrices = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


def dense(
    activation: Activation,
    x: Float[Array, "*B D"],
    weights: Float[Array, "*B k"],
    chosen: Int[Array, "*B k"],
    matrices: Matrices,
) -> Float[Array, "*B D"]:
    """Every expert on every token: the oracle.

    Args:
      activation: by name.
      x: states.
      weights, chosen: of each token's experts.
      matrices: W, V and U of every expert.
    """
    inner, gate, outer = matrices
    hidden = ACTIVATIONS[activation](jnp.einsum("...d,edf->...ef", x, inner)) * jnp.einsum("...d,edf->...ef", x, gate)
    share = (jax.nn.one_hot(chosen, len(inner), dtype=weights.dtype) * weights[..., None]).sum(-2)
    return jnp.einsum("...e,...ef,efd->...d", share.astype(x.dtype), hidden, outer)


def dropless(
    form: Form | None,
    activation: Activation,
    x: Float[Array, "B S D"],
    weights: Float[Array, "B S k"],
    chosen: Int[Array, "B S k"],
    matrices: Matrices,
) -> Float[Array, "B S D"]:
    """The experts' results by one of the forms that drop no token.

    Sorted forms run on each device. Where the rules in scope cut activations along `expert`, tokens travel: see `travelling`.
    Elsewhere experts are gathered: tokens stay where they are, and the matrices of all experts come to each device. Both
    with the features inside whole, or cut where the rules do that.

    Args:
      form: None is 'ragged' on a TPU and 'blocks' elsewhere.
      activation: by name.
      x: states.
      weights, chosen: of each token's experts.
      matrices: W, V and U of every expert.

    Raises:
      UserError: experts that do not divide over their devices.
    """
    if form == "dense":
        return dense(activation, x, weights, chosen, matrices)
    form = ("ragged" if platform() == "tpu" else "blocks") if form is None else form
    apart, inside = cuts("expert"), cuts("mlp")
    gathered: Callable[..., jax.Array] = partial(blocks if form == "blocks" else ragged, activation)
    run = partial(travelling, form, activation, apart) if apart else gathered

    def here(x, weights, chosen, *matrices):
        flat = lambda y: y.reshape(-1, y.shape[-1])
        out = run(flat(x), flat(weights), flat(chosen), *matrices).reshape(x.shape)
        # Each device has a part of the sum over the features inside.
        return (jax.lax.psum(out, inside) if inside else out,)

    tokens = ("batch", "length", None)
    arrays: list[tuple[jax.Array, tuple[str | None, ...]]] = [(y, tokens) for y in (x, weights, chosen)]
    names = (("expert", None, "mlp"), ("expert", None, "mlp"), ("expert", "mlp", None))
    arrays += list(zip(matrices, names, strict=True))
    (out,) = on_each_device(here, arrays, [(x.shape, tokens)])
    return out


def picked(
    activation: Activation,
    x: Float[Array, "G S D"],
    weights: Float[Array, "G E C"],
    slots: Int[Array, "G E C"],
    matrices: Matrices,
) -> Float[Array, "G S D"]:
    """Experts on as many tokens each: of each group of tokens, those in the slots.

    Args:
      activation: by name.
      x: states, in groups.
      weights, slots: of each expert's tokens.
      matrices: W, V and U of every expert.
    """
    hidden = jax.vmap(lambda x, slots: x[slots])(x, slots)
    each = _multiplied(activation, hidden, matrices) * weights[..., None].astype(x.dtype)
    add = lambda slots, y: jnp.zeros(x.shape[1:], x.dtype).at[slots].add(y)
    return jax.vmap(add)(slots, each)


def _multiplied(activation, hidden, matrices):
    """As many rows [..., E, C, D] of each expert, through its matrices."""
    inner, gate, outer = matrices
    inside = ACTIVATIONS[activation](jnp.einsum("...ecd,edf->...ecf", hidden, inner))
    return jnp.einsum("...ecf,efd->...ecd", inside * jnp.einsum("...ecd,edf->...ecf", hidden, gate), outer)


def capacity(
    factor: float,
    activation: Activation,
    x: Float[Array, "B S D"],
    weights: Float[Array, "B S k"],
    chosen: Int[Array, "B S k"],
    present: Bool[Array, "B S"],
    matrices: Matrices,
) -> tuple[Float[Array, "B S D"], Bool[Array, "B S k"]]:
    """As many tokens an expert at most; those that come later in the batch are dropped, padding first of all.

    Args:
      factor: an expert's tokens over those it has when all have as many.
      activation: by name.
      x: states.
      weights, chosen: of each token's experts.
      present: which tokens are no padding.
      matrices: W, V and U of every expert.

    Returns:
      The experts' results, and which choices were kept.

    Raises:
      UserError: less than one token an expert.
    """
    experts, k = len(matrices[0]), chosen.shape[-1]
    flat, m = chosen.reshape(-1), chosen.size
    if factor * m < experts:
        raise UserError(
            f"Experts.capacity = {factor}: {m} choices of {experts} experts give {factor * m / experts:.2g} tokens an expert, "
            f"expected 1 or more: raise it, or use another Experts.form"
        )
    most = min(math.ceil(factor * m / experts), m // k)
    last = jnp.repeat(~present.reshape(-1), k)
    order = jnp.argsort(2 * flat + last, stable=True)
    sizes = jnp.bincount(flat, length=experts)
    rank = jnp.zeros((m,), order.dtype).at[order].set(jnp.arange(m) - (jnp.cumsum(sizes) - sizes)[flat[order]])
    kept = rank < most
    where = jnp.where(kept, flat * most + rank, experts * most)
    token = jnp.full((experts * most,), m // k).at[where].set(jnp.arange(m) // k, mode="drop")
    hidden = x.reshape(-1, x.shape[-1]).at[token].get(mode="fill", fill_value=0)
    each = _multiplied(activation, hidden.reshape(experts, most, -1), matrices).reshape(hidden.shape)
    back = each.at[where].get(mode="fill", fill_value=0).reshape(*chosen.shape, -1)
    return (back * weights[..., None].astype(x.dtype)).sum(-2), kept.reshape(chosen.shape)
