"""The loss of a whole run from its learning rates: fitted on one or two runs, it foretells any other schedule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int

from evaluation.laws import robust
from partitioning import UserError
from partitioning.ranges import Range

DECAY = 0.999
Decay = Annotated[float, Range(0, 1, open="high")]


def areas(rates: Float[np.ndarray, T], *, decay: Decay = DECAY) -> tuple[Float[np.ndarray, T], Float[np.ndarray, T]]:
    """The forward area and the annealing area after each step.

    S1(s) = sum_{i<=s} rate_i;  S2(s) = sum_{i<=s} m_i,  m_i = decay * m_{i-1} + rate_{i-1} - rate_i,  m_1 = 0.

    Args:
      rates: the learning rate of every step.
      decay: how slowly the model follows a fall of the rate.
    """
    from scipy.signal import lfilter

    rates = np.asarray(rates, np.float64)
    falls = np.concatenate([[0.0], -np.diff(rates)])
    return np.cumsum(rates), np.cumsum(lfilter([1.0], [1.0, -decay], falls))


@dataclass(frozen=True)
class AnnealingLaw:
    """L(s) = floor + scale * S1(s)^-exponent - gain * S2(s); see `areas`.

    Args:
      floor, scale, exponent: of the loss at a constant rate.
      gain: what a unit of annealing takes away.
      decay: of the annealing area.
    """

    floor: float
    scale: float
    exponent: float
    gain: float
    decay: float = DECAY

    def __call__(self, rates: Float[np.ndarray, T]) -> Float[np.ndarray, T]:
        """The loss after each step of a schedule."""
        forward, annealed = areas(rates, decay=self.decay)
        with np.errstate(divide="ignore"):  # A warm-up from 0 has learned nothing after its first step.
            return self.floor + self.scale * forward**-self.exponent - self.gain * annealed


@dataclass(frozen=True, eq=False)
class Logged:
    """What a run leaves behind for the law.

    Args:
      rates: the learning rate of every step.
      steps: steps done (from 1) when a loss was measured.
      losses: measured then.
    """

    rates: Float[np.ndarray, T]
    steps: Int[np.ndarray, N]
    losses: Float[np.ndarray, N]


def fit_annealing_law(runs: Sequence[Logged], *, decay: Decay = DECAY) -> AnnealingLaw:
    """The law with the least Huber loss on log losses over all runs, the best of several starts.

    Args:
      runs: with losses after the warm-up only: the law does not hold in it. Whether annealing gains shows only where the rate
        falls.
      decay: of the annealing area; the paper's is from 0.99 to 0.999.

    Raises:
      UserError: fewer than five losses, or a step that a run has no rate for.

    Source: "Scaling Law with Learning Rate Annealing", Tissue, Wang and Wang, 2024.
    Differs: a warm-up's rates count as they are, in both areas.
    """
    forward, annealed, losses = [], [], []
    for run in runs:
        steps = np.asarray(run.steps)
        if len(steps) and (steps.min() < 1 or steps.max() > len(run.rates)):
            raise UserError(f"losses at steps {steps.min()} to {steps.max()}, and rates for {len(run.rates)} steps")
        one, two = areas(run.rates, decay=decay)
        forward.append(one[steps - 1])
        annealed.append(two[steps - 1])
        losses.append(np.asarray(run.losses, np.float64))
    s1, s2, found = np.concatenate(forward), np.concatenate(annealed), np.concatenate(losses)
    if len(found) < 5:
        raise UserError(f"an annealing law has four numbers: expected five losses or more, not {len(found)}")
    middle = np.exp(np.log(s1).mean())
    l1, unit = np.log(s1 / middle), max(float(np.abs(s2).max()), 1e-30)

    def residuals(theta: Float[np.ndarray, 4]) -> Float[np.ndarray, N]:
        loss = np.exp(theta[0]) + np.exp(theta[1] - theta[2] * l1) - theta[3] * s2 / unit
        return np.log(np.maximum(loss, 1e-12)) - np.log(found)

    least = found.min()
    starts = (
        np.array([np.log(share * least), np.log(max(found.mean() - share * least, 1e-6)), exponent, gain * least])
        for exponent, share, gain in itertools.product((0.2, 0.8), (0.3, 0.8), (0.0, 0.1))
    )
    best = robust(residuals, starts, ([-30.0, -30.0, 0.0, -np.inf], [np.inf, np.inf, 10.0, np.inf]))
    return AnnealingLaw(
        floor=float(np.exp(best[0])),
        scale=float(np.exp(best[1]) * middle ** best[2]),
        exponent=float(best[2]),
        gain=float(best[3] / unit),
        decay=decay,
    )
