"""Scaling laws: a power law with a floor, fitted to losses at several sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from partitioning import UserError

DELTA = 1e-3
"""Where Huber's loss goes from squares to absolute values, in nats of log loss: outliers pull little."""
EXPONENTS = (0.1, 0.4, 1.0)
FLOORS = (0.1, 0.8)
"""Starts: exponents, and floors as shares of the smallest loss."""


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + scale * x^-exponent.

    Args:
      floor: the loss of an endless x.
      scale, exponent: of what x takes away.
    """

    floor: float
    scale: float
    exponent: float

    def __call__(self, x: Float[np.ndarray, P] | float) -> Float[np.ndarray, P]:
        return self.floor + self.scale * np.asarray(x, np.float64) ** -self.exponent


def robust(
    residuals: Callable[[Float[np.ndarray, P]], Float[np.ndarray, N]],
    starts: Iterable[Float[np.ndarray, P]],
    bounds: tuple[Sequence[float], Sequence[float]],
) -> Float[np.ndarray, P]:
    """The parameters with the least sum of Huber's loss, the best of several starts.

    huber(r) = r^2 / 2 where |r| <= delta, else delta (|r| - delta / 2).

    Args:
      residuals: from parameters.
      starts: of the parameters, moved into the bounds.
      bounds: lowest and highest parameters.
    """
    from scipy.optimize import least_squares

    low, high = np.asarray(bounds[0]), np.asarray(bounds[1])
    best: Any = None
    for start in starts:
        found = np.clip(start, low + 1e-9, high - 1e-9)
        # Squares first, then tighter and tighter: one outlier would drag a fit by squares too far off for absolute values.
        for scale in (1.0, 0.1, 0.01, DELTA):
            result = least_squares(
                residuals, found, bounds=(low, high), loss="huber", f_scale=scale, x_scale="jac", max_nfev=200
            )
            found = result.x
        best = result if best is None or result.cost < best.cost else best
    return best.x


def fit_power_law(x: Float[np.ndarray, N], losses: Float[np.ndarray, N]) -> PowerLaw:
    """The power law with the least Huber loss on log losses, the best of several starts.

    min over (E, A, alpha) of sum_i huber(log(E + A x_i^-alpha) - log L_i).

    Args:
      x: parameters, tokens or FLOPs.
      losses: all above 0.

    Raises:
      UserError: fewer than four points, or values that have no logarithm.

    Source: "Training Compute-Optimal Large Language Models", Hoffmann et al., 2022.
    Differs: one x; x is measured in its geometric mean while the fit goes on.
    """
    x, losses = _points(x, losses)
    # In units of its own middle, scale and exponent do not move together.
    middle = np.exp(np.log(x).mean())
    lx, ll = np.log(x / middle), np.log(losses)

    def start(exponent: float, share: float) -> Float[np.ndarray, 3]:
        floor = share * losses.min()
        return np.array([np.log(floor), (np.log(losses - floor) + exponent * lx).mean(), exponent])

    floor, scale, exponent = robust(
        lambda theta: np.logaddexp(theta[0], theta[1] - theta[2] * lx) - ll,
        itertools.starmap(start, itertools.product(EXPONENTS, FLOORS)),
        ([-30.0, -np.inf, 0.0], [ll.min(), np.inf, 10.0]),
    )
    return PowerLaw(float(np.exp(floor)), float(np.exp(scale) * middle**exponent), float(exponent))


def fit_interval(
    x: Float[np.ndarray, N], losses: Float[np.ndarray, N], *, level: float = 0.95, draws: int = 100, seed: int = 0
) -> tuple[PowerLaw, tuple[float, float]]:
    """The fit, and the exponent's interval: log residuals are drawn anew around the fitted curve, and it is fitted again.

    Args:
      x, losses: as in `fit_power_law`.
      level: of the interval, by percentiles.
      draws: refits.
      seed: of the draws.

    Raises:
      UserError: as `fit_power_law`.

    Source: "An Introduction to the Bootstrap", Efron and Tibshirani, 1993.
    Differs: residuals are stretched by sqrt(n / (n - 3)), since a fit of three numbers takes some of them away.
    """
    law = fit_power_law(x, losses)
    x, losses = _points(x, losses)
    fitted = law(x)
    residuals = np.log(losses) - np.log(fitted)
    residuals = (residuals - residuals.mean()) * np.sqrt(len(x) / (len(x) - 3))
    rng = np.random.default_rng(seed)
    again = [fit_power_law(x, fitted * np.exp(rng.choice(residuals, len(x)))).exponent for _ in range(draws)]
    low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
    return law, (float(low), float(high))


def _points(x: Float[np.ndarray, N], losses: Float[np.ndarray, N]) -> tuple[Float[np.ndarray, N], Float[np.ndarray, N]]:
    x, losses = np.asarray(x, np.float64), np.asarray(losses, np.float64)
    if x.shape != losses.shape or x.ndim != 1 or len(x) < 4:
        raise UserError(f"a power law with a floor needs four points or more, not {len(np.atleast_1d(x))}")
    if not (np.all(x > 0) and np.all(losses > 0) and np.all(np.isfinite(losses))):
        raise UserError("a power law is fitted to numbers above 0")
    return x, losses
