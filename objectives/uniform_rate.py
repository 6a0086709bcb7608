"""A rate that is drawn anew for every step."""

from __future__ import annotations

from typing import Annotated

import jax

from objectives.base import Schedule
from partitioning import UserError
from partitioning.ranges import Range

Share = Annotated[float, Range(0, 1)]


def uniform_rate(*, low: Share = 0.0, high: Share, seed: Annotated[int, Range(0, (1 << 32) - 1)] = 0) -> Schedule:
    """A share of the tokens, uniform between two ends and drawn for each step.

    rate(step) = low + (high - low) u,  u uniform in [0, 1), from `seed` and the step alone.

    Args:
      low, high: the ends.
      seed: of the draws; runs of other seeds see the same rates.

    Raises:
      UserError: `low` above `high`.

    Source: "Mask-Predict: Parallel Decoding of Conditional Masked Language Models", Ghazvininejad et al., 2019.
    Differs: one rate a step and not one a text.
    """
    if low > high:
        raise UserError(f"uniform_rate: low = {low} is above high = {high}")
    key = jax.random.key(seed)
    return lambda step: low + (high - low) * jax.random.uniform(jax.random.fold_in(key, step))
