"""Learning curves over a budget: tokens, FLOPs or seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from partitioning import UserError


@dataclass(frozen=True, eq=False)
class Curve:
    """A figure over what had been spent when it was measured.

    Args:
      spent: tokens, FLOPs or seconds, rising.
      values: the figure.

    Raises:
      UserError: they are not as many, none, or `spent` does not rise.
    """

    spent: Float[np.ndarray, T]
    values: Float[np.ndarray, T]

    def __post_init__(self):
        if self.spent.shape != self.values.shape or self.spent.ndim != 1 or not len(self.spent):
            raise UserError(f"a curve needs as many values as points, not {self.spent.shape} and {self.values.shape}")
        if np.any(np.diff(self.spent) <= 0):
            raise UserError("a curve's points must rise")

    def at(self, spent: Float[np.ndarray, P]) -> Float[np.ndarray, P]:
        """The values at other points, linear between its own; not a number outside of them."""
        return np.interp(spent, self.spent, self.values, left=np.nan, right=np.nan)

    def reaches(self, value: float, *, best: str = "min") -> float:
        """What had been spent when the curve first was as good as `value`, linear between points; infinite if it never was.

        Args:
          value: of the figure.
          best: 'min' or 'max'.
        """
        ahead = self.values - value if best == "min" else value - self.values
        there = np.flatnonzero(ahead <= 0)
        if not len(there):
            return float("inf")
        i = int(there[0])
        if i == 0:
            return float(self.spent[0])
        share = ahead[i - 1] / (ahead[i - 1] - ahead[i])
        return float(self.spent[i - 1] + share * (self.spent[i] - self.spent[i - 1]))


def shared(curves: Sequence[Curve], count: int = 64) -> tuple[Float[np.ndarray, P], Float[np.ndarray, "C P"]]:
    """All curves at the same points, evenly spaced over what every one of them covers.

    Args:
      curves: over the same kind of budget.
      count: points, P.

    Raises:
      UserError: no curves, or no budget that all of them cover.
    """
    if not curves:
        raise UserError("no curves to align")
    low, high = max(c.spent[0] for c in curves), min(c.spent[-1] for c in curves)
    if low > high:
        raise UserError(f"the curves share no budget: one begins at {low:g} and one ends at {high:g}")
    points = np.linspace(low, high, count)
    return points, np.stack([curve.at(points) for curve in curves])
