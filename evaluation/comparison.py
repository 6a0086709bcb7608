"""Arms beside a baseline: means, differences, corrected tests, and a verdict that calls noise noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evaluation.intervals import Interval, Level, over_seeds
from evaluation.paired import difference_over_seeds, holm, t_test
from partitioning import UserError

Direction = Literal["min", "max"]
Effect = Literal["better", "worse", "within noise"]
Verdict = Literal["agrees", "null", "disagrees"]


@dataclass(frozen=True)
class Comparison:
    """One arm beside the baseline.

    Args:
      mean: over the arm's seeds.
      difference: arm - baseline over the seeds that both have; None for the baseline and where none is shared. Its level is
        that of all the differences together: of m, each has 1 - (1 - level) / m.
      p: of the paired t-test, corrected by Holm; None where there is no difference or fewer than two pairs.
      effect: what the difference's interval says.
    """

    mean: Interval
    difference: Interval | None
    p: float | None
    effect: Effect


def compare(
    values: Mapping[str, Mapping[int, float]], *, baseline: str, best: Direction, level: Level = 0.95
) -> dict[str, Comparison]:
    """Every arm beside the baseline, paired by seed.

    Args:
      values: the figure by arm and seed; an arm without values is left out.
      baseline: the arm that the others are compared with.
      best: whether the smallest or the largest figure is best.
      level: of each mean's interval, and of all differences' intervals together (Bonferroni's).

    Raises:
      UserError: the baseline has no values.
    """
    if not values.get(baseline):
        raise UserError(f"the baseline {baseline!r} has no figures to compare with")
    told = {arm: found for arm, found in values.items() if found}
    pairs = {arm: sorted(found.keys() & told[baseline].keys()) for arm, found in told.items() if arm != baseline}
    pairs = {arm: seeds for arm, seeds in pairs.items() if seeds}
    each = 1 - (1 - level) / max(len(pairs), 1)
    side = lambda arm, seeds: [told[arm][seed] for seed in seeds]
    p = holm({arm: t_test(side(arm, seeds), side(baseline, seeds)) for arm, seeds in pairs.items()})
    out = {}
    for arm, found in told.items():
        difference = None
        if arm in pairs:
            difference = difference_over_seeds(side(arm, pairs[arm]), side(baseline, pairs[arm]), level=each)
        tested = p[arm] if arm in p and p[arm] == p[arm] else None
        mean = over_seeds(list(found.values()), level=level)
        out[arm] = Comparison(mean, difference, tested, effect(difference, best=best))
    return out


def effect(difference: Interval | None, *, best: Direction) -> Effect:
    """What an interval of arm - baseline says; one that holds 0 says nothing."""
    if difference is None or difference.holds(0.0):
        return "within noise"
    return "better" if (difference.mean < 0) == (best == "min") else "worse"


def verdict(difference: Interval | None, *, best: Direction, expected: Literal["better", "worse"]) -> Verdict:
    """Whether a measured difference agrees with a claim: null where its interval holds 0."""
    found = effect(difference, best=best)
    return "null" if found == "within noise" else "agrees" if found == expected else "disagrees"
