"""From a trained dense model to a mixture of experts, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.block import Block
from models.feed_forward import FeedForward
from models.mixture.experts import Experts
from models.mixture.routers import TopKRouter
from models.stack import Stack, stacked
from models.trunk import Trunk
from models.vocabulary import within
from partitioning import UserError

MATRICES = ("inner", "gate", "outer")


def upcycle(trunk: Trunk, *, experts: int, top_k: int, rngs: nnx.Rngs, **options: Any) -> Trunk:
    """A copy whose gated feed-forward layers are experts, each with the layer's own weights, behind new routers.

    y = sum_e w_e f(x) = f(x) where the weights w of a token's experts add up to 1, f the dense layer: at the start the two
    models compute the same.

    In a config the same is a model of experts with `training.Run.init_from` a run of the dense one and
    `training.Run.reinitialise = ['router']`; experts in some layers only are a pattern of blocks.

    Args:
      trunk: dense; it is left as it is.
      experts, top_k: E and k.
      rngs: where the routers' weights come from.
      options: further arguments of `Experts`; its router is `TopKRouter` with `renormalise` by default.

    Raises:
      UserError: no layer has a dense feed-forward layer, or one is not of the experts' form: gated, without biases and norm.

    Source: "Sparse Upcycling", Komatsuzaki et al., 2023.
    Differs: every layer by default, where the paper takes every second; the optimizer's state is not carried over.
    """
    options = {"router": partial(TopKRouter, renormalise=True)} | options
    made = nnx.clone(trunk)
    found = 0
    for block, times, _ in _blocks(made.stack):
        old: Any = block.feed_forward
        if type(old) is not FeedForward:
            continue
        if old.gate is None or old.inner_bias is not None or old.inner_norm is not None:
            raise UserError(
                "upcycle takes feed-forward layers that are gated, without biases and without a norm inside"
            )
        width, hidden = old.inner.get_value().shape[-2:]
        sizes = {"experts": experts, "top_k": top_k, "hidden": hidden, "activation": old.activation}
        make = partial(_experts, width, sizes | options)
        key = rngs.params()
        with within(trunk.vocabulary):
            new = make(key) if times is None else stacked(make, jax.random.split(key, times))
        for name in MATRICES:
            leaf = getattr(new, name)
            leaf.set_value(jnp.broadcast_to(getattr(old, name).get_value()[..., None, :, :], leaf.get_value().shape))
        block.feed_forward, found = new, found + 1
    if not found:
        raise UserError("no layer of this trunk has a dense feed-forward layer: there is nothing to upcycle")
    made.family = None
    return made


def merge_experts(trunk: Trunk, *, loads: Mapping[int, Sequence[float]] | None = None) -> Trunk:
    """A copy whose experts are merged into one dense feed-forward layer: each matrix the mean of the experts'.

    W = sum_e p_e W_e, p_e = 1 / E, or e's share of the load. A shared expert's features stand beside those of the mean, and
    a router's `scale` goes into its last matrix: of experts that are alike, the result is theirs, where the weights of a
    token's experts add up to the scale.

    Args:
      trunk: with experts; it is left as it is.
      loads: how much each expert was chosen, by layer; None has all count alike.

    Raises:
      UserError: no layer has experts, a shared expert is gated, or loads are missing or of another number of experts.

    Source: "One Student Knows All Experts Know", Xue et al., 2022; by load: "Merge, Then Compress", Li et al., 2024.
    Differs: experts' features are not aligned before, which those of an upcycled model hardly need; without the distillation
      that follows in the former, and into one expert where the latter keeps several.
    """
    made = nnx.clone(trunk)
    found = 0
    for block, times, layers in _blocks(made.stack):
        if type(block.feed_forward) is Experts:
            shares = _shares(block.feed_forward, layers, loads)
            block.feed_forward = _merged(block.feed_forward, shares if times is not None else shares[0])
            found += 1
    if not found:
        raise UserError("no layer of this trunk has experts: there is nothing to merge")
    made.family = None
    return made


def _blocks(stack: Stack) -> Iterator[tuple[Block, int | None, list[int]]]:
    """Every block, how often it is repeated where it is scanned, and the layers that it is."""
    for i, block in stack.layers.items():
        yield block, None, [int(i)]
    for k, block in stack.scanned.items():
        yield block, stack.repetitions, [int(k) + r * stack.period for r in range(stack.repetitions)]


def _experts(width: int, options: Mapping[str, Any], key: jax.Array) -> Experts:
    return Experts(width, rngs=nnx.Rngs(key), **options)


def _shares(experts: Experts, layers: list[int], loads: Mapping[int, Sequence[float]] | None) -> Float[Array, "L E"]:
    """The weight of each expert in the mean, by layer."""
    many = experts.inner.get_value().shape[-3]
    if loads is None:
        return jnp.full((len(layers), many), 1 / many)
    for layer in layers:
        given = loads.get(layer, ())
        if len(given) != many or min(given) < 0 or not sum(given) > 0:
            raise UserError(
                f"merge_experts: loads[{layer}] = {list(given)}: expected the loads of {many} experts, not all 0"
            )
    rows = jnp.asarray([list(loads[layer]) for layer in layers], float)
    return rows / rows.sum(-1, keepdims=True)


def _merged(experts: Experts, shares: Float[Array, "*L E"]) -> FeedForward:
    if experts.shared_gate is not None:
        raise UserError("merge_experts: the shared expert's result is gated, which no dense layer does")
    scale = getattr(experts.router, "scale", 1.0)
    means = {}
    for name in MATRICES:
        value = getattr(experts, name).get_value()
        mean = jnp.einsum("...e,...edf->...df", shares.astype(value.dtype), value)
        mean = mean * scale if name == "outer" else mean
        if experts.shared is not None:
            beside = getattr(experts.shared, name).get_value()
            mean = jnp.concatenate([mean, beside], axis=-2 if name == "outer" else -1)
        means[name] = mean
    width, hidden = means["inner"].shape[-2:]
    plain = partial(FeedForward, width, hidden=hidden, activation=experts.activation, gated=True)
    made = nnx.eval_shape(lambda: plain(rngs=nnx.Rngs(0)))
    for name, mean in means.items():
        getattr(made, name).set_value(mean)
    return made
