"""Whether two arms differ: tests on pairs (the same seed, the same example), and Holm's correction for many of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from evaluation.intervals import Interval, Level, over_examples, over_seeds
from partitioning import UserError


def differences(one: Sequence[float], other: Sequence[float]) -> Float[np.ndarray, N]:
    """one - other, pair by pair.

    Raises:
      UserError: they are not pairs.
    """
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"paired scores must be as many on both sides, not {a.shape} and {b.shape}")
    return a - b


def difference_over_seeds(one: Sequence[float], other: Sequence[float], *, level: Level = 0.95) -> Interval:
    """The mean difference of two arms that share their seeds, and Student's interval of it."""
    return over_seeds(differences(one, other), level=level)


def difference_over_examples(
    one: Sequence[float], other: Sequence[float], *, level: Level = 0.95, draws: int = 4000, seed: int = 0
) -> Interval:
    """The mean difference on the same examples, and its bootstrap interval: a pair is drawn whole."""
    return over_examples(differences(one, other), level=level, draws=draws, seed=seed)


def t_test(one: Sequence[float], other: Sequence[float]) -> float:
    """The two-sided p of the paired t-test: how often equal arms would differ as much.

    t = mean(d) / (s(d) / sqrt(n)),  d = one - other.

    Args:
      one, other: scores of the same seeds, in the same order.

    Returns:
      From 0 to 1; not a number for fewer than two pairs.

    Source: "The Probable Error of a Mean", Student, 1908.
    Differs: pairs that differ all by the same amount have p = 0, or 1 where that is nothing.
    """
    from scipy import stats

    found = differences(one, other)
    if len(found) < 2:
        return float("nan")
    if not found.std():
        return float(not found.mean())
    return float(stats.ttest_1samp(found, 0.0).pvalue)


def sign_flip_test(one: Sequence[float], other: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> float:
    """The two-sided p of the permutation test on pairs: the two labels of each pair are swapped at random.

    p = share of swaps whose |sum of differences| is no smaller than the one that was seen.

    Args:
      one, other: scores of the same seeds or examples, in the same order.
      draws: swaps, where not all 2^n of them are tried; the one that was seen is counted with them.
      seed: of the swaps.

    Source: "The Design of Experiments", Fisher, 1935.
    Differs: nothing known.
    """
    found = differences(one, other)
    seen = abs(found.sum())
    # Sums of the same numbers in another order differ in the last bits.
    least = seen - 1e-9 * np.abs(found).sum()
    if len(found) < 63 and 2 ** len(found) <= draws:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(found))))
        return float(np.mean(np.abs(signs @ found) >= least))
    rng = np.random.default_rng(seed)
    rest, hits = draws, 0
    while rest:
        size = min(rest, 256)
        signs = rng.integers(0, 2, (size, len(found))) * 2.0 - 1.0
        hits += int(np.sum(np.abs(signs @ found) >= least))
        rest -= size
    return (hits + 1) / (draws + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of several tests, corrected so that the chance of any false finding among them is what one p says.

    Of m sorted p: p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).

    Args:
      p_values: by name; those that are not numbers (a test that could not be made) stay so and are not counted.

    Source: "A Simple Sequentially Rejective Multiple Test Procedure", Holm, 1979.
    Differs: nothing known.
    """
    made = sorted((p, name) for name, p in p_values.items() if not np.isnan(p))
    found, most = dict(p_values), 0.0
    for i, (p, name) in enumerate(made):
        most = max(most, min(1.0, (len(made) - i) * p))
        found[name] = most
    return found
