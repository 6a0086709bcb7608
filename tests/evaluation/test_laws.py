"""Laws recover what was planted, and foretell what they did not see."""

import numpy as np
import optax
import pytest

from evaluation.annealing import AnnealingLaw, Logged, areas, fit_annealing_law
from evaluation.laws import PowerLaw, fit_interval, fit_power_law
from partitioning import UserError
from training import wsd

SIZES = np.geomspace(1e6, 1e10, 12)


@pytest.mark.parametrize("law", [PowerLaw(1.7, 400.0, 0.34), PowerLaw(0.05, 30.0, 0.12), PowerLaw(2.0, 1e7, 0.9)])
def test_a_planted_law_is_found(law):
    found = fit_power_law(SIZES, law(SIZES))
    assert (found.floor, found.exponent) == pytest.approx((law.floor, law.exponent), rel=2e-2, abs=2e-2)
    # One size told wrong by a fifth moves nothing: Huber's loss.
    losses = law(SIZES)
    losses[5] *= 1.2
    assert fit_power_law(SIZES, losses).exponent == pytest.approx(law.exponent, rel=0.05)


def test_the_unit_of_size_does_not_matter():
    losses = PowerLaw(1.7, 400.0, 0.34)(SIZES) * (1 + np.random.default_rng(0).normal(0, 1e-3, 12))
    one, other = fit_power_law(SIZES, losses), fit_power_law(SIZES / 1e6, losses)
    assert other.exponent == pytest.approx(one.exponent, rel=1e-4)
    assert other(SIZES / 1e6) == pytest.approx(one(SIZES), rel=1e-6)


def test_a_noisy_exponent_lies_in_its_interval():
    """Of six noisy sets the interval holds the planted exponent in most, and is no wider than it need be."""
    law, held, widths = PowerLaw(1.7, 400.0, 0.34), 0, []
    for seed in range(6):
        noise = np.exp(np.random.default_rng(seed).normal(0, 2e-3, 12))
        _, (low, high) = fit_interval(SIZES, law(SIZES) * noise, draws=10, level=0.9)
        held += low <= law.exponent <= high
        widths.append(high - low)
    assert held >= 4
    assert 0 < np.median(widths) < 0.1


def test_what_is_no_law_is_refused():
    with pytest.raises(UserError, match="four points"):
        fit_power_law(SIZES[:3], SIZES[:3])
    with pytest.raises(UserError, match="above 0"):
        fit_power_law(SIZES, -SIZES)
    with pytest.raises(UserError, match="five losses"):
        fit_annealing_law([Logged(np.ones(9), np.array([3]), np.array([1.0]))])
    with pytest.raises(UserError, match="for 9 steps"):
        fit_annealing_law([Logged(np.ones(9), np.array([3, 10]), np.array([1.0, 1.0]))])


def test_areas_by_the_double_sum():
    rates = np.random.default_rng(0).uniform(0, 1, 30)
    one, two = areas(rates, decay=0.9)
    for s in range(1, 31):
        assert one[s - 1] == pytest.approx(rates[:s].sum())
        fallen = sum((rates[k - 1] - rates[k]) * 0.9 ** (i - k) for i in range(1, s) for k in range(1, i + 1))
        assert two[s - 1] == pytest.approx(fallen)
    # At a constant rate nothing is annealed; without memory the area is the fall itself.
    assert areas(np.full(9, 0.3))[1].tolist() == [0.0] * 9
    assert areas(rates, decay=0.0)[1] == pytest.approx(rates[0] - rates)


def test_an_annealing_law_foretells_other_schedules():
    """Fitted on a cosine and a constant rate, it knows the losses of a WSD schedule and of a linear one."""
    law, steps = AnnealingLaw(floor=2.0, scale=0.6, exponent=0.45, gain=0.4, decay=0.99), np.arange(1000)
    rates = lambda schedule: np.asarray([float(schedule(s)) for s in steps])
    warm = lambda rest: optax.join_schedules([optax.linear_schedule(0, 1e-2, 50), rest], [50])
    cosine, constant = rates(warm(optax.cosine_decay_schedule(1e-2, 950))), rates(warm(optax.constant_schedule(1e-2)))
    measured = np.arange(60, 1001, 20)
    noise = np.random.default_rng(0).normal(0, 5e-4, (2, len(measured)))
    seen = [
        Logged(r, measured, law(r)[measured - 1] * np.exp(n)) for r, n in zip((cosine, constant), noise, strict=True)
    ]
    found = fit_annealing_law(seen, decay=0.99)
    assert (found.floor, found.exponent, found.gain) == pytest.approx((2.0, 0.45, 0.4), rel=0.1)
    unseen = [
        rates(wsd(peak=1e-2, warmup_steps=50, stable_steps=700, decay_steps=250)),
        rates(warm(optax.linear_schedule(1e-2, 0, 950))),
    ]
    for schedule in unseen:
        np.testing.assert_allclose(found(schedule)[measured - 1], law(schedule)[measured - 1], rtol=2e-3)
    # Without annealing in what was seen, its gain cannot be known, and the law says nothing wrong where there is none.
    alone = fit_annealing_law(seen[1:], decay=0.99)
    np.testing.assert_allclose(alone(constant)[measured - 1], law(constant)[measured - 1], rtol=2e-3)
