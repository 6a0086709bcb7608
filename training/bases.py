"""Matrices in the basis of their singular vectors, which is found anew every so many steps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from optax import contrib

from partitioning import on_each_device
from training.per_layer import Axes, stack_positions
from training.singular import singular


@dataclass(frozen=True)
class Wide:
    """How a leaf becomes matrices [..., k, n] with k <= n, and back.

    Args:
      shape: of the leaf.
      order: the leaf's axes as the matrices have them: stacks (so that the state is sharded with them), other axes that
        hold separate matrices, the shorter side, the longer one.
      stacks: logical names of the stacks.
      batch: how many of the axes hold separate matrices.
      size: k.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    stacks: Axes
    batch: int
    size: int

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: Axes, numbers: contrib.MuonDimensionNumbers) -> "Wide":
        """For a leaf of these axes, whose matrices have these sides; inputs are k where the sides are equal."""
        length = lambda side: math.prod(shape[place] for place in side)
        short, long = sorted((numbers.reduction_axis, numbers.output_axis), key=length)
        stacks = stack_positions(axes)
        others = [place for place in range(len(shape)) if place not in (*stacks, *short, *long)]
        names = tuple(axes[place] for place in stacks)
        return cls(shape, (*stacks, *others, *short, *long), names, len(stacks) + len(others), length(short))

    def matrices(self, leaf: Array) -> Float[Array, "... k n"]:
        """The leaf's matrices."""
        moved = leaf.transpose(self.order)
        return moved.reshape(*moved.shape[: self.batch], self.size, -1)

    def leaf(self, matrices: Float[Array, "... k n"]) -> Array:
        """The inverse of `matrices`."""
        return matrices.reshape([self.shape[place] for place in self.order]).transpose(np.argsort(self.order))

    def start(self, rank: int, dtype: Any) -> Float[Array, "... k r"]:
        """A basis before the first one is found: the first unit vectors."""
        batch = tuple(self.shape[place] for place in self.order[: self.batch])
        unit = jnp.eye(self.size, min(rank, self.size), dtype=dtype)
        return jnp.broadcast_to(unit, (*batch, *unit.shape))


def all_vectors(matrices: Float[Array, "... k n"]) -> Float[Array, "... k k"]:
    """The left singular vectors: an orthogonal matrix."""
    return singular(matrices)[0]


def seen_vectors(matrices: Float[Array, "... k n"]) -> Float[Array, "... k k"]:
    """The left singular vectors whose singular value is not 0, and zeros in place of the others.

    The others are any that make the basis whole: an expert that got two tokens has two directions.
    """
    vectors, values = singular(matrices)
    return vectors * (values > 0)[..., None, :]


def renewed(
    due: Bool[Array, ""],
    find: Callable[[Array], Array],
    bases: Mapping[str, Array],
    wide: Mapping[str, Wide],
    tree: Mapping[str, Array],
) -> dict[str, Float[Array, "... k r"]]:
    """The bases; where `due`, the first vectors that `find` finds in the matrices of `tree`: it runs in such steps alone.

    A matrix that is 0 (of an expert without tokens) keeps its basis. Each device searches for itself in whole matrices:
    those that it has, where stacks are cut, and otherwise all.
    """

    def found(name: str, basis: Array) -> Array:
        matrices = wide[name].matrices(tree[name])
        names = (*wide[name].stacks, *(None,) * (matrices.ndim - len(wide[name].stacks)))
        # Left to the compiler, the search itself would be cut, and each of its thousand rounds send rows about.
        vectors = on_each_device(lambda own: find(own)[..., : basis.shape[-1]], [(matrices, names)])
        return jnp.where((matrices != 0).any((-2, -1), keepdims=True), vectors, basis)

    # One condition for all leaves and layers: inside a map over layers it would become a choice between two results
    # that are both computed.
    search = lambda: {name: found(name, basis) for name, basis in bases.items()}
    return jax.lax.cond(due, search, lambda: dict(bases))
