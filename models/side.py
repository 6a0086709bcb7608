"""What a layer returns beside its result, as raw sums that add up over rows and devices: terms of the loss, and tallies."""

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tally:
    """How a layer's tokens chose among its parts; for figures, never for the loss.

    load_e = chosen_e / sum(chosen), the share of part e among the choices of tokens that are no padding.

    Args:
      chosen: how often each part was chosen, by tokens that are no padding.
      dropped: how many of these choices found no room; None where there always is.
      bias: what is added to each part's score when tokens choose, summed over calls; None where nothing is.
      calls: how many, so that a bias is also a mean of sums.
      layers: the index of each layer that this is of, in its stack.
      of: what a part is called.
    """

    chosen: Float[Array, "*layers E"]
    dropped: Float[Array, "*layers E"] | None = None
    bias: Float[Array, "*layers E"] | None = None
    calls: Float[Array, "*layers"] | float = 1.0
    layers: tuple[int, ...] = field(default=(0,), metadata={"static": True})
    of: str = field(default="expert", metadata={"static": True})


Sides = dict[str, Side]
Tallies = dict[str, Tally]
Beside = dict[str, Side | Tally]


def apart(beside: Beside) -> tuple[Sides, Tallies]:
    """The terms, and the tallies."""
    sides = {name: value for name, value in beside.items() if isinstance(value, Side)}
    return sides, {name: value for name, value in beside.items() if isinstance(value, Tally)}
