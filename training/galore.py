"""GaLore: Adam on the part of a gradient that lies in its first singular vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import optax
from jaxtyping import Array

from partitioning.ranges import Range, check_fields
from training.bases import Wide, renewed, seen_vectors
from training.matrices import MatrixDescent
from training.per_layer import Axes


class GaLoreState(NamedTuple):
    """Adam's state of the projected gradients [..., r, n], and the bases [..., k, r], by parameter."""

    adam: optax.ScaleByAdamState
    basis: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class GaLore(MatrixDescent):
    """Adam on gradients projected to a low rank, for matrices; AdamW for every other leaf.

    direction = P adam(P^T g), P [k, r] the first r left singular vectors of g [k, n] (k the shorter side), found at the
    first step and then every `every` steps. A matrix keeps r (k + 2 n) numbers, where Adam keeps 2 k n.

    Args:
      rank: r; matrices whose shorter side is less have that.
      every: steps between two searches for P. Moments are kept from one P to the next.

    Source: GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, Zhao et al., 2024.
    Differs: P has zeros for directions that g has not; no scale of its own: where `adam_learning_rate` is four times
      `learning_rate` it is the authors' 0.25. `optax.contrib.galore` projects the longer side.
    """

    rank: Annotated[int, Range(1)] = 128
    every: Annotated[int, Range(1)] = 200

    def __post_init__(self) -> None:
        check_fields(self)

    def views(self, axes: Mapping[str, Axes], tree: Mapping[str, Array]) -> dict[str, Wide]:
        """How each leaf becomes matrices."""
        numbers = self.matrices(axes)
        return {name: Wide.of(leaf.shape, axes[name], numbers[name]) for name, leaf in tree.items()}

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        adam = self.adam()

        def projected(basis: Mapping[str, Array], matrices: Mapping[str, Array]) -> dict[str, Array]:
            return {name: basis[name].mT @ x for name, x in matrices.items()}

        def init(params: Mapping[str, Array]) -> GaLoreState:
            wide = self.views(axes, params)
            basis = {name: view.start(self.rank, params[name].dtype) for name, view in wide.items()}
            low = projected(basis, {name: view.matrices(params[name]) for name, view in wide.items()})
            return GaLoreState(adam.init(low), basis)

        def update(updates: Mapping[str, Array], state: GaLoreState, params: Any = None) -> tuple[dict, GaLoreState]:
            del params
            wide = self.views(axes, updates)
            matrices = {name: view.matrices(updates[name]) for name, view in wide.items()}
            basis = renewed(state.adam.count % self.every == 0, seen_vectors, state.basis, wide, updates)
            low, moments = adam.update(projected(basis, matrices), state.adam)
            return {name: wide[name].leaf(basis[name] @ x) for name, x in low.items()}, GaLoreState(moments, basis)

        return optax.GradientTransformation(init, update)
