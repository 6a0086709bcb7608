"""Conda: Adam whose second moment is taken in the basis of the momentum's singular vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from partitioning.ranges import Range, check_fields
from training.bases import Wide, all_vectors, renewed
from training.matrices import MatrixDescent
from training.per_layer import Axes


class CondaState(NamedTuple):
    """Updates made; by parameter the momentum, the second moment in the basis (both laid out as it), and the basis."""

    steps: Int[Array, ""]
    mu: dict[str, Array]
    nu: dict[str, Array]
    basis: dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Conda(MatrixDescent):
    """Adam in the coordinates of the momentum's singular vectors, for matrices; AdamW for every other leaf.

    direction = U m' / (sqrt(v) + eps),  m' = U^T m, with bias-corrected running means m of g (rate b1) and v of
    (U^T g)^2 (rate b2); U are the left singular vectors of m, found at the first step and then every `every` steps. U
    stands on the shorter side of a matrix, on its inputs where both are equal. With U = I this is AdamW.

    Args:
      every: steps between two searches for U.

    Where m has less than k singular values, the rest of U is any that makes it orthogonal: that which the rotations of
    `training.singular` end with.

    Source: Conda: Column-Normalized Adam for Training Large Language Models Faster, Wang et al., 2025.
    Differs: no scale of its own: where `adam_learning_rate` is four times `learning_rate` it is the authors' 0.25;
      epsilon is added after the bias correction, as in AdamW.
    """

    every: Annotated[int, Range(1)] = 2000

    def __post_init__(self) -> None:
        check_fields(self)

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        numbers = self.matrices(axes)

        def views(tree: Mapping[str, Array]) -> dict[str, Wide]:
            return {name: Wide.of(leaf.shape, axes[name], numbers[name]) for name, leaf in tree.items()}

        def init(params: Mapping[str, Array]) -> CondaState:
            basis = {name: view.start(view.size, params[name].dtype) for name, view in views(params).items()}
            zeros = optax.tree.zeros_like(params)
            return CondaState(jnp.zeros((), jnp.int32), zeros, zeros, basis)

        def update(updates: Mapping[str, Array], state: CondaState, params: Any = None) -> tuple[dict, CondaState]:
            del params
            wide = views(updates)
            mu = optax.tree.update_moment(updates, state.mu, self.b1, 1)
            due = state.steps % self.every == 0
            basis = renewed(due, all_vectors, state.basis, wide, mu)

            def turned(tree: Mapping[str, Array]) -> dict[str, Array]:
                inside = lambda name, x: wide[name].leaf(basis[name].mT @ wide[name].matrices(x))
                return {name: inside(name, x) for name, x in tree.items()}

            nu = optax.tree.update_moment(turned(updates), state.nu, self.b2, 2)
            steps = optax.safe_increment(state.steps)
            mean = optax.tree.bias_correction(turned(mu), self.b1, steps)
            square = optax.tree.bias_correction(nu, self.b2, steps)
            inside = {name: m / (jnp.sqrt(square[name]) + self.adam_eps) for name, m in mean.items()}
            out = {name: wide[name].leaf(basis[name] @ wide[name].matrices(x)) for name, x in inside.items()}
            return out, CondaState(steps, mu, nu, basis)

        return optax.GradientTransformation(init, update)
