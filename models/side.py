"""Side terms: what a layer asks to have added to the loss, as raw sums that add up over rows and devices."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Side:
    """coefficient * sum(total) / weight, or coefficient * sum_i (fixed_i / weight) (total_i / weight).

    The second form is for products of two batch means, one of which has no gradient (load balance). Whoever sums over
    micro-batches sums `fixed` and `weight` first, over all of them, and the loss is then exact and linear in `total`.

    Args:
      total: sums that carry a gradient.
      weight: what they are divided by.
      fixed: sums without a gradient, of `total`'s shape, or None.
      coefficient: 0 for a metric.
    """

    total: Float[Array, "*shape"]
    weight: Float[Array, "*layers"]
    fixed: Float[Array, "*shape"] | None = None
    coefficient: float = field(default=0.0, metadata={"static": True})


Sides = dict[str, Side]
