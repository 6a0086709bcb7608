"""Optimizer transformations that see one layer and one expert, however the leaves are stacked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from partitioning.axes import STACKED

Axes = tuple[str | None, ...]


def stack_positions(axes: Axes) -> tuple[int, ...]:
    """Positions of the axes along which a leaf holds independent layers or experts, ascending."""
    return tuple(position for position, name in enumerate(axes) if name in STACKED)


def layer_axes(axes: Axes) -> Axes:
    """The axes of one layer and one expert of a leaf: `axes` without the stacked ones."""
    return tuple(name for name in axes if name not in STACKED)


def _over_stack(function: Callable, positions: tuple[int, ...], inputs: tuple, outputs: Any) -> Callable:
    """`function` of one layer, mapped over stack axes; `inputs` and `outputs` are trees of bool or None.

    True marks a leaf that is shaped like the layer: its stack axes stay where the parameter has them, so that it can be
    sharded like the parameter. False marks any other leaf: its stack axes lead. None is not mapped.
    """
    for depth in reversed(range(len(positions))):
        # By then the `depth` stack axes outside this one are gone, and all of them stood before it.
        place = positions[depth] - depth

        def placed(tree: Any, place: int = place) -> Any:
            return jax.tree.map(lambda follows: place if follows else 0, tree)

        in_axes = tuple(None if tree is None else placed(tree) for tree in inputs)
        function = jax.vmap(function, in_axes=in_axes, out_axes=placed(outputs))
    return function


def per_layer(tx: optax.GradientTransformation, axes: Mapping[str, Axes]) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` to each layer and each expert of each leaf separately.

    A transformation that reads a leaf's norm, rank or matrix would otherwise read the norm, rank or matrix of the
    stack. Whatever `tx` sums over its whole tree it now sums over one layer of one leaf. Elementwise transformations
    give the same either way and are cheaper without.

    Args:
      tx: the transformation of a single array.
      axes: logical axes of every parameter; those named in `partitioning.axes.STACKED` are mapped over, wherever they
        stand among the leaf's axes.

    Returns:
      A transformation of flat dicts. Its state is `{parameter: state of tx}`; in it, leaves shaped like a layer have
      the parameter's own layout, and all others (counts, factored moments) get the stack axes in front.
    """
    single = optax.with_extra_args_support(tx)

    def follows(name: str, leaf: Any) -> Any:
        positions = stack_positions(axes[name])
        shape = tuple(size for place, size in enumerate(leaf.shape) if place not in positions)
        state = jax.eval_shape(single.init, jax.ShapeDtypeStruct(shape, leaf.dtype))
        return jax.tree.map(lambda value: value.shape == shape, state)

    def init(params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: _over_stack(single.init, stack_positions(axes[name]), (True,), follows(name, leaf))(leaf)
            for name, leaf in params.items()
        }

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[dict, dict]:
        new_updates, new_state = {}, {}
        for name, gradient in updates.items():
            like = follows(name, gradient if params is None else params[name])

            def step(gradient: Any, state: Any, leaf: Any) -> tuple[Any, Any]:
                return single.update(gradient, state, leaf, **extra)

            inputs = (True, like, None if params is None else True)
            mapped = _over_stack(step, stack_positions(axes[name]), inputs, (True, like))
            new_updates[name], new_state[name] = mapped(gradient, state[name], None if params is None else params[name])
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def state_axes(state: Any, axes: Mapping[str, Axes], params: Mapping[str, Any]) -> Any:
    """Logical axes of every leaf of an optimizer state, so that moments are sharded like their parameter.

    A leaf belongs to the innermost dict key on its path that is a parameter. Shaped like it, it takes its axes;
    starting with its stack sizes (what `per_layer` adds), it takes those; anything else is replicated.

    Args:
      state: the state, or its shapes from `jax.eval_shape(tx.init, params)`.
      axes: logical axes of every parameter.
      params: the parameters, or their shapes.

    Returns:
      A tree of the structure of `state` with a tuple of axis names at each leaf.
    """

    def leaf_axes(path: tuple, leaf: Any) -> Axes:
        shape = tuple(leaf.shape)
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key in axes]
        if keys:
            name = keys[-1]
            if shape == tuple(params[name].shape):
                return axes[name]
            positions = stack_positions(axes[name])
            if positions and shape[: len(positions)] == tuple(params[name].shape[place] for place in positions):
                stacks = tuple(axes[name][place] for place in positions)
                return stacks + (None,) * (len(shape) - len(positions))
        return (None,) * len(shape)

    return jax.tree_util.tree_map_with_path(leaf_axes, state)
