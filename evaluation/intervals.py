"""How far a figure may be from its mean: intervals over seeds and over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float

from partitioning import UserError
from partitioning.ranges import Range

Level = Annotated[float, Range(0, 1, open=True)]
CHUNK = 256
"""Resamples drawn at once."""


@dataclass(frozen=True)
class Interval:
    """A mean and what it lies between.

    Args:
      mean: of the values.
      low, high: of the interval; infinite where one value says nothing of it.
      count: how many values.
      level: how often such an interval holds the true mean.
    """

    mean: float
    low: float
    high: float
    count: int
    level: float

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2

    def holds(self, value: float) -> bool:
        """Whether a value lies in it, ends included."""
        return self.low <= value <= self.high

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low, self.count, self.level)


def over_seeds(values: Sequence[float] | Float[np.ndarray, N], *, level: Level = 0.95) -> Interval:
    """The mean of independent runs, and Student's interval of it.

    mean -+ t((1 + level) / 2, n - 1) * s / sqrt(n),  s^2 = sum (x - mean)^2 / (n - 1).

    Args:
      values: one a seed; their errors are taken for normal.
      level: share of such intervals that hold the true mean.

    Raises:
      UserError: no values.

    Source: "The Probable Error of a Mean", Student, 1908.
    Differs: nothing known.
    """
    from scipy import stats

    found = _checked(values)
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, -np.inf, np.inf, len(found), level)
    half = float(stats.t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(mean, mean - half, mean + half, len(found), level)


def over_examples(scores: Float[np.ndarray, N], *, level: Level = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """The mean over examples, and its bootstrap interval by percentiles.

    Args:
      scores: one an example.
      level: share of such intervals that hold the true mean.
      draws: resamples, each of as many examples as there are, with replacement.
      seed: of the resamples.

    Raises:
      UserError: no scores.

    Source: "An Introduction to the Bootstrap", Efron and Tibshirani, 1993.
    Differs: nothing known.
    """
    found = _checked(scores)
    means = resampled(found[None], draws=draws, seed=seed)[:, 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(found.mean()), float(low), float(high), len(found), level)


def resampled(scores: Float[np.ndarray, "A N"], *, draws: int, seed: int) -> Float[np.ndarray, "D A"]:
    """Means of resampled examples; in a resample all arms have the same examples, so that differences are paired.

    Args:
      scores: of each arm on each example.
      draws: resamples, D.
      seed: of the resamples.
    """
    count = scores.shape[1]
    rng = np.random.default_rng(seed)
    # How often each example is drawn says all that a mean needs.
    sizes = [CHUNK] * (draws // CHUNK) + ([draws % CHUNK] if draws % CHUNK else [])
    times = (rng.multinomial(count, np.full(count, 1 / count), size=size) for size in sizes)
    return np.concatenate([part @ scores.T / count for part in times])


def _checked(values: Sequence[float] | Float[np.ndarray, N]) -> Float[np.ndarray, N]:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found):
        raise UserError(f"an interval needs a list of at least one number, not an array of shape {found.shape}")
    return found
