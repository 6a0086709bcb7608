"""Fira: GaLore, and beside it the part of the gradient that the projection leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from partitioning.ranges import Range
from training.galore import GaLore, GaLoreState
from training.per_layer import Axes


class FiraState(NamedTuple):
    """GaLore's state, and the norms of the last residuals, by parameter, one for each matrix."""

    galore: GaLoreState
    norm: dict[str, Array]


def scaling(moved: Float[Array, "... k n"], seen: Float[Array, "... k n"], eps: float) -> Float[Array, "... 1 n"]:
    """How much longer Adam made each column of the projected gradient."""
    length = lambda x: jnp.linalg.norm(x, axis=-2, keepdims=True)
    return length(moved) / (length(seen) + eps)


@dataclass(frozen=True, kw_only=True)
class Fira(GaLore):
    """GaLore's update, and the rest of the gradient scaled by what Adam did to the projection, column by column.

    direction = P n + s * (g - P r),  r = P^T g,  n = adam(r),  s_j = |n_j| / |r_j| for column j; the second part S is
    shortened where it grew too fast: |S_t| <= limit * |S_{t-1}|. State is GaLore's and one number a matrix.

    Args:
      limit: largest growth of the second part's norm from one step to the next.

    Source: Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, Chen et al., 2024.
    Differs: n is bias-corrected before s and the limit are computed; after a norm of 0 (an expert without tokens) there
      is no limit, where the authors' leaves 1e-8.
    """

    limit: Annotated[float, Range(1)] = 1.01

    def direction(self, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
        inner = super().direction(axes)

        def init(params: Mapping[str, Array]) -> FiraState:
            galore = inner.init(params)
            return FiraState(galore, {name: jnp.zeros_like(p[..., 0, 0]) for name, p in galore.basis.items()})

        def update(updates: Mapping[str, Array], state: FiraState, params: Any = None) -> tuple[dict, FiraState]:
            inside, galore = inner.update(updates, state.galore, params)
            out, norms = {}, {}
            for name, view in self.views(axes, updates).items():
                gradient, moved, basis = view.matrices(updates[name]), view.matrices(inside[name]), galore.basis[name]
                # P has orthonormal columns, or zeros: those of P r are as long as those of r.
                seen = basis @ (basis.mT @ gradient)
                rest = scaling(moved, seen, self.adam_eps) * (gradient - seen)
                norm, last = jnp.linalg.norm(rest, axis=(-2, -1)), state.norm[name]
                norms[name] = jnp.where(last > 0, jnp.minimum(norm, self.limit * last), norm)
                shorter = norms[name] / jnp.where(norm > 0, norm, 1)
                out[name] = view.leaf(moved + shorter[..., None, None] * rest)
            return out, FiraState(galore, norms)

        return optax.GradientTransformation(init, update)
