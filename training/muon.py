"""Muon: momentum made orthogonal, for the matrices of each layer and each expert."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import contrib

from partitioning.axes import HEADS, KV, LENGTH, STACKED, VOCAB
from training.optimizers import Descent, Rate, at_step, by_name, is_norm_or_bias
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
class Muon(Descent):
    """Momentum, made orthogonal by Newton-Schulz iterations, for matrices; AdamW for every other leaf.

    direction = c * O(n), n = nesterov momentum of the gradient, O(n) close to U V^T for n = U S V^T, and
    c = consistent_rms * sqrt(max(inputs, outputs)), or sqrt(max(1, outputs / inputs)) where that is None.

    What is a matrix, and of which axes, says `matrix_axes`: one for each layer and each expert.

    Args:
      beta: rate of the momentum.
      iterations: number of Newton-Schulz iterations.
      eps: added to the norm that scales the momentum before them.
      nesterov: whether to look ahead by one step of momentum.
      consistent_rms: root mean square of an update before the learning rate; at 0.2 AdamW's learning rates serve.
      exclude: regular expressions of matrices that AdamW is to take (a classifier's head).
      adam_learning_rate: the rate of the leaves under AdamW; None is `learning_rate`.
      b1: rate of AdamW's first moment.
      b2: rate of AdamW's second moment.
      adam_eps: AdamW's epsilon.

    Source: Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024; the constant root mean square
      is from Muon is Scalable for LLM Training, Liu et al., 2025.
    Differs: heads are one matrix and not one each; the momentum is a running mean with bias correction, as in optax.
    """

    beta: float = 0.95
    iterations: int = 5
    eps: float = 1e-8
    nesterov: bool = True
    consistent_rms: float | None = 0.2
    exclude: tuple[str, ...] = ()
    adam_learning_rate: Rate | None = None
    b1: float = 0.9
    b2: float = 0.999
    adam_eps: float = 1e-8

    def matrices(self, axes: Mapping[str, Axes]) -> dict[str, contrib.MuonDimensionNumbers]:
        """The leaves that Muon takes, with the axes of their matrices.

        Raises:
          UserError: a pattern of `exclude` matches no parameter.
        """
        excluded = first_match(self.exclude, axes, owner="Muon.exclude")
        found = {name: matrix_axes(name, names) for name, names in axes.items() if name not in excluded}
        return {name: numbers for name, numbers in found.items() if numbers is not None}

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        numbers = self.matrices(axes)
        # optax's own `muon` chooses leaves by their rank, and so takes stacked norms for matrices and stacked matrices
        # for none. Its parts, told the axes, map over all others.
        return optax.chain(
            contrib.scale_by_muon(
                ns_steps=self.iterations,
                beta=self.beta,
                eps=self.eps,
                nesterov=self.nesterov,
                weight_dimension_numbers=numbers,
            ),
            optax.stateless(lambda updates, _: {name: self._sized(u, numbers[name]) for name, u in updates.items()}),
        )

    def __call__(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        # Built on all axes, so that rules by path are checked against all of them.
        decayed = self.decayed(axes)
        matrices = self.matrices(axes)
        rest = tuple(name for name in axes if name not in matrices)
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.adam_eps)
        muon = optax.chain(self.direction(axes), decayed, self.rated(axes, self.learning_rate))
        return by_name(
            {
                "muon": (tuple(matrices), muon),
                "adam": (rest, optax.chain(adam, decayed, self.rated(axes, self._adam_rate))),
            }
        )

    def _sized(self, update: jax.Array, numbers: contrib.MuonDimensionNumbers) -> jax.Array:
        """The orthogonal update times c of the class's formula."""
        inputs, outputs = (
            math.prod(update.shape[place] for place in places)
            for places in (numbers.reduction_axis, numbers.output_axis)
        )
        if self.consistent_rms is None:
            return math.sqrt(max(1.0, outputs / inputs)) * update
        return math.sqrt(max(inputs, outputs)) * self.consistent_rms * update

    @property
    def _adam_rate(self) -> Rate:
        return self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate

    def rates(self, step: Any) -> dict[str, jax.Array]:
        rates = super().rates(step)
        return (
            rates if self.adam_learning_rate is None else rates | {"adam_learning_rate": at_step(self._adam_rate, step)}
        )
