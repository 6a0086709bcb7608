"""Which leaves are matrices, one for each layer and expert, and what is common to the optimizers made for them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import optax
from optax import contrib

from partitioning.axes import HEADS, KV, LENGTH, STACKED, VOCAB
from training.optimizers import Descent, Rate, at_step, by_name, from_table, is_norm_or_bias
from training.paths import first_match
from training.per_layer import Axes


def matrix_axes(name: str, axes: Axes) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a leaf are the rows (inputs) and columns (outputs) of its matrices; None where it is no matrix.

    Stacked axes (`layers`, `expert`) hold separate matrices. Of the others, `heads` and `kv` side by side are one
    dimension: an attention kernel [embed, heads, kv] is the matrix embed x (heads kv), an output kernel
    [heads, kv, embed] the matrix (heads kv) x embed. With three dimensions or more left, unnamed axes also hold
    separate matrices (a fused [embed, 3, heads, kv] kernel is three). Embeddings and heads (an axis `vocab`), position
    tables (`length`), norms and biases are no matrices, nor is what then has another number of dimensions than two.
    """
    if is_norm_or_bias(name) or VOCAB in axes or LENGTH in axes:
        return None
    places = [place for place, axis in enumerate(axes) if axis not in STACKED]
    if len(places) > 2:
        places = [place for place in places if axes[place] is not None]
    sides: list[tuple[int, ...]] = []
    for place in places:
        if sides and axes[place] == KV and axes[sides[-1][-1]] == HEADS and sides[-1][-1] == place - 1:
            sides[-1] = (*sides[-1], place)
        else:
            sides.append((place,))
    if len(sides) != 2:
        return None
    return contrib.MuonDimensionNumbers(reduction_axis=sides[0], output_axis=sides[1])


@dataclass(frozen=True, kw_only=True)
class MatrixDescent(Descent):
    """A descent whose direction is for matrices alone; AdamW takes every other leaf.

    What is a matrix, and of which axes, says `matrix_axes`: one for each layer and each expert.

    Args:
      exclude: regular expressions of matrices that AdamW is to take (a classifier's head).
      adam_learning_rate: the rate of the leaves under AdamW; None is `learning_rate`.
      b1: rate of Adam's first moment.
      b2: rate of Adam's second moment.
      adam_eps: Adam's epsilon.
    """

    exclude: tuple[str, ...] = ()
    adam_learning_rate: Rate | None = None
    b1: float = 0.9
    b2: float = 0.999
    adam_eps: float = 1e-8

    def matrices(self, axes: Mapping[str, Axes]) -> dict[str, contrib.MuonDimensionNumbers]:
        """The leaves that the direction is for, with the axes of their matrices.

        Raises:
          UserError: a pattern of `exclude` matches no parameter.
        """
        excluded = first_match(self.exclude, axes, owner=f"{type(self).__name__}.exclude")
        found = {name: matrix_axes(name, names) for name, names in axes.items() if name not in excluded}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def adam(self) -> optax.GradientTransformation:
        """Adam with these constants."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.adam_eps)

    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        # Built on all axes, so that rules by path are checked against all of them.
        decayed = self.decayed(axes)
        matrices = self.matrices(axes)
        rest = tuple(name for name in axes if name not in matrices)
        own = optax.chain(self.stored(self.direction(axes)), decayed, self.rated(axes, self.learning_rate))
        adam = optax.chain(self.stored(self.adam()), decayed, self.rated(axes, self._adam_rate))
        return by_name({"matrices": (tuple(matrices), own), "rest": (rest, adam)})

    @property
    def _adam_rate(self) -> Rate:
        return self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate

    def rates(self, step: Any) -> dict[str, jax.Array]:
        rates = super().rates(step)
        return (
            rates if self.adam_learning_rate is None else rates | {"adam_learning_rate": at_step(self._adam_rate, step)}
        )

    def tabled(self, tables: Mapping[str, jax.Array]) -> Self:
        adam = self.adam_learning_rate
        own = None if adam is None else from_table(adam, tables["adam_learning_rate"])
        return replace(super().tabled(tables), adam_learning_rate=own)
