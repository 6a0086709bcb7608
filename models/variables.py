"""Kinds of variables, and modules as flat dicts of arrays."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from partitioning.axes import LAYERS

Flat = dict[str, Any]
Axes = dict[str, tuple[str | None, ...]]
M = TypeVar("M", bound=nnx.Module)


class Buffer(nnx.Variable):
    """State that no optimizer moves: a queue, a teacher, running statistics. Changed after a step only."""


class Statistic(Buffer):
    """A buffer that moves with what a step saw. Its cotangent is no derivative but a sum over the step's tokens, whatever the
    sharding and the accumulation; the module that holds it gets the sums after the step, by name, as `observe(sums)`.
    """


@jax.custom_vjp
def observed(x: Array, statistics: Mapping[str, Array], sums: Mapping[str, Array]) -> Array:
    """x as it is; in the backward pass each statistic's cotangent is its sum.

    Args:
      x: anything that the loss depends on.
      statistics: values of `Statistic`s, by name.
      sums: over the tokens of this call, by the same names and of the same shapes.
    """
    del statistics, sums
    return x


def _observed_forward(x, statistics, sums):
    return x, {name: sums[name].astype(value.dtype) for name, value in statistics.items()}


observed.defvjp(_observed_forward, lambda sums, pull: (pull, sums, None))


def param(value: Any, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter whose dimensions carry logical axis names."""
    return nnx.Param(value, axes=axes)


def buffer(value: Any, axes: tuple[str | None, ...] | None = None) -> Buffer:
    """A buffer; without names its dimensions are not sharded."""
    return Buffer(value, axes=(None,) * value.ndim if axes is None else axes)


def as_buffers(module: M) -> M:
    """A copy of a module with every parameter turned into a buffer: a teacher that moves without a gradient."""
    twin = nnx.clone(module)
    for node in [node for _, node in nnx.iter_graph(twin) if isinstance(node, nnx.Module)]:
        for name, value in list(vars(node).items()):
            if isinstance(value, nnx.Param):
                setattr(node, name, Buffer(value.get_value(), axes=value.get_metadata()["axes"]))
    return twin


def flatten(module: nnx.Module, kind: type[nnx.Variable]) -> Flat:
    """The arrays of one kind in a module, by path joined with '/'."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, kind))}


def axes_of(module: nnx.Module, kind: type[nnx.Variable]) -> Axes:
    """The logical names of every leaf of one kind; a stacked leaf's first dimension is `layers`."""
    found: Axes = {}
    for path, leaf in nnx.to_flat_state(nnx.state(module, kind)):
        names = tuple(leaf.get_metadata()["axes"])
        stacked = ("scanned" in path) and leaf.get_value().ndim == len(names) + 1
        found["/".join(map(str, path))] = (LAYERS, *names) if stacked else names
    return found


def replace_values(module: nnx.Module, values: Mapping[str, jax.Array]) -> None:
    """Sets parameters and buffers by path; those that are not named keep what they have."""
    for path, leaf in nnx.to_flat_state(nnx.state(module, (nnx.Param, Buffer))):
        name = "/".join(map(str, path))
        if name in values:
            leaf.set_value(values[name].astype(leaf.get_value().dtype))


def rebuild(graph: nnx.GraphDef, abstract: nnx.State, values: Mapping[str, jax.Array]) -> nnx.Module:
    """A module from its graph definition and flat arrays; the leaves' kinds and names come from `abstract`."""
    flat = [(path, leaf.replace(values["/".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
