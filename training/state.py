"""The state of a run: what a step changes and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from models.stack import restack, unstack
from models.variables import Flat
from partitioning import Placement
from training.per_layer import state_axes
from training.trees import Trees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything a step takes and returns.

    Args:
      step: steps taken.
      seed: of every draw.
      rates: of each stage, the optimizer's rates by name, as tables over all steps. Seed and rates are here so that runs which
        differ in them share their programs.
      params, frozen, buffers: arrays by leaf name.
      optimizer: optax state over `params`.
      average: exponential moving average of `params`, or None.
      guard: the guard's state.
    """

    step: Any
    seed: Any
    rates: tuple[dict[str, Any], ...]
    params: Flat
    frozen: Flat
    buffers: Flat
    optimizer: Any
    average: Flat | None
    guard: Any

    def kept(self) -> dict[str, Any]:
        """What every checkpoint holds: all but the frozen leaves, and seed and rates, which are the config's."""
        return {name: value for name, value in vars(self).items() if name not in ("frozen", "seed", "rates")}


def abstract_state(
    trees: Trees,
    tx: optax.GradientTransformation,
    *,
    rates: tuple[dict[str, Any], ...],
    average: bool,
    guard: Any,
) -> State:
    """The state as shapes."""
    pick = lambda kind: {name: trees.shapes[name] for name in trees.of_kind(kind)}
    params = pick("params")
    return State(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        seed=jax.ShapeDtypeStruct((), jnp.uint32),
        rates=jax.tree.map(lambda table: jax.ShapeDtypeStruct(table.shape, table.dtype), rates),
        params=params,
        frozen=pick("frozen"),
        buffers=pick("buffers"),
        optimizer=jax.eval_shape(tx.init, params),
        average={k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in params.items()} if average else None,
        guard=jax.eval_shape(lambda: guard),
    )


def state_shardings(state: State, trees: Trees, placement: Placement) -> State:
    """A sharding for every leaf: moments follow their parameters, counters are on every device."""
    leaves = trees.shardings(placement)
    follow = lambda flat: {name: leaves[name] for name in flat}
    axes = {name: trees.axes[name] for name in state.params}
    names = state_axes(state.optimizer, axes, state.params)
    place = lambda leaf, a: placement.parameter(a, leaf.shape, "optimizer state")
    everywhere = lambda tree: jax.tree.map(lambda _: placement.replicated, tree)
    return State(
        step=placement.replicated,
        seed=placement.replicated,
        rates=everywhere(state.rates),
        params=follow(state.params),
        frozen=follow(state.frozen),
        buffers=follow(state.buffers),
        optimizer=jax.tree.map(place, state.optimizer, names),
        average=None if state.average is None else follow(state.average),
        guard=everywhere(state.guard),
    )


def by_index(tree: Any, names: Mapping[str, tuple[str, ...]]) -> Any:
    """The same tree with every layer under its index: what a checkpoint stores, however the stack was scanned.

    A dict counts as one of leaves when its keys are leaf names, wherever it stands (moments do).

    Args:
      tree: the state, or a part.
      names: from `models.stack.layer_names` of all leaves.
    """
    return _map_flat(lambda flat: unstack(flat, names, entry), tree, names)


def entry(x: Any, r: int) -> Any:
    """Entry r along the first dimension, of an array or of an abstract one with its sharding."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[r]
    sharding = x.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)


def by_group(tree: Any, like: Any, names: Mapping[str, tuple[str, ...]]) -> Any:
    """The inverse of `by_index`, into the grouping of `like` (arrays or shapes)."""
    regroup = lambda target, flat: restack(flat, {name: names[name] for name in target})
    return _map_flat(regroup, like, names, tree)


def _map_flat(function: Callable[..., Any], tree: Any, names: Mapping[str, Any], *rest: Any) -> Any:
    """Applies `function` to every dict of leaves; `rest` are trees alike outside those dicts."""
    again = lambda node, *others: _map_flat(function, node, names, *others)
    if isinstance(tree, Mapping):
        if tree and all(name in names for name in tree):
            return function(tree, *rest)
        return {key: again(value, *(other[key] for other in rest)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [again(*nodes) for nodes in zip(tree, *rest, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return rest[0] if rest else tree
