"""Intervals, paired tests and verdicts against scipy, by simulation, and by exchanging what must not matter."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from evaluation.comparison import compare, verdict
from evaluation.curves import Curve, shared
from evaluation.intervals import Interval, over_examples, over_seeds, resampled
from evaluation.paired import difference_over_examples, holm, sign_flip_test, t_test
from partitioning import UserError


def test_over_seeds_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 5)
    found = over_seeds(list(values), level=0.9)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), expected.low, expected.high))
    one = over_seeds([2.0])
    assert (one.mean, one.low, one.high) == (2.0, -np.inf, np.inf)
    with pytest.raises(UserError, match="at least one"):
        over_seeds([])


def test_paired_tests_are_scipys():
    rng = np.random.default_rng(1)
    one, other = rng.normal(0, 1, 8), rng.normal(0.5, 1, 8)
    assert t_test(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    exact = stats.permutation_test(
        (one - other,), lambda d, axis: d.sum(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert sign_flip_test(one, other) == pytest.approx(exact.pvalue)
    assert sign_flip_test(other, one) == sign_flip_test(one, other)
    assert t_test([1.0, 2.0], [1.0, 2.0]) == 1
    assert t_test([1.5, 2.5], [1.0, 2.0]) == 0
    assert np.isnan(t_test([1.0], [2.0]))
    with pytest.raises(UserError, match="as many"):
        t_test([1.0, 2.0], [1.0])


def test_a_sampled_permutation_test_is_near_the_exact_one():
    rng = np.random.default_rng(2)
    one, other = rng.normal(0, 1, 14), rng.normal(0.4, 1, 14)
    exact, drawn = sign_flip_test(one, other, draws=1 << 14), sign_flip_test(one, other, draws=8000)
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 8000))


def test_equal_arms_are_told_apart_as_rarely_as_the_level_says():
    rng = np.random.default_rng(3)
    rejected = [sign_flip_test(*rng.normal(0, 1, (2, 8))) <= 0.1 for _ in range(400)]
    assert 0.06 < np.mean(rejected) < 0.14


def test_holm_by_brute_force():
    """A test is rejected at a level just when its corrected p is no larger: Holm's steps, one by one."""
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": float("nan")}
    found = holm(p)
    made = sorted((v, k) for k, v in p.items() if v == v)
    for level in np.linspace(0.001, 0.2, 57):
        stepped = set()
        for i, (value, name) in enumerate(made):
            if value > level / (len(made) - i):
                break
            stepped.add(name)
        assert {name for name, value in found.items() if value <= level} == stepped
    assert np.isnan(found["e"])


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(4)
    held = [over_examples(rng.exponential(1.0, 80), level=0.9, draws=400, seed=i).holds(1.0) for i in range(300)]
    assert 0.83 < np.mean(held) < 0.95


def test_arms_are_resampled_together():
    """Two arms that differ by the same amount on every example differ by it in every resample."""
    scores = np.random.default_rng(5).normal(0, 10, 40)
    drawn = resampled(np.stack([scores, scores + 0.5]), draws=300, seed=0)
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 0.5)
    assert drawn.shape == (300, 2)
    assert drawn[:, 0].std() == pytest.approx(scores.std() / np.sqrt(40), rel=0.2)
    found = difference_over_examples(scores + 0.5, scores)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
    # The same seed draws the same.
    assert over_examples(scores, seed=1) == over_examples(scores, seed=1) != over_examples(scores, seed=2)


def test_which_arm_stands_first_does_not_matter():
    rng = np.random.default_rng(6)
    values = {arm: dict(enumerate(rng.normal(i, 1, 5))) for i, arm in enumerate("abcd")}
    found = compare(values, baseline="a", best="min")
    for order in itertools.permutations("abcd"):
        again = compare({arm: values[arm] for arm in order}, baseline="a", best="min")
        assert json.dumps({a: vars(c) for a, c in sorted(again.items())}, default=vars) == json.dumps(
            {a: vars(c) for a, c in sorted(found.items())}, default=vars
        )
    assert found["a"].difference is None
    assert found["d"].effect == "worse"
    assert compare(values, baseline="a", best="max")["d"].effect == "better"
    # Three differences hold together with 95 %, so each with more.
    assert found["d"].difference.level == pytest.approx(1 - 0.05 / 3)
    differences = [values["d"][s] - values["a"][s] for s in range(5)]
    assert found["d"].difference == over_seeds(differences, level=1 - 0.05 / 3)


def test_arms_of_pure_noise_are_called_so():
    """Of sweeps whose arms are all alike, those with any effect are as few as the level says, however many arms."""
    rng = np.random.default_rng(7)
    wrong = 0
    for _ in range(300):
        values = {str(arm): dict(enumerate(rng.normal(0, 1, 5))) for arm in range(8)}
        wrong += any(c.effect != "within noise" for c in compare(values, baseline="0", best="min").values())
    assert wrong / 300 < 0.09


def test_pairs_are_seeds_that_both_have():
    found = compare(
        {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {1: 3.0, 0: 2.0}, "c": {5: 1.0}, "d": {}}, baseline="a", best="max"
    )
    assert found["b"].difference.mean == pytest.approx(1.0)
    assert found["b"].difference.count == 2
    assert found["c"].difference is None
    assert found["c"].effect == "within noise"
    assert "d" not in found
    with pytest.raises(UserError, match="'d' has no figures"):
        compare({"a": {0: 1.0}, "d": {}}, baseline="d", best="max")


@pytest.mark.parametrize(
    ("low", "high", "best", "expected", "words"),
    [
        (-2.0, -1.0, "min", "better", "agrees"),
        (-2.0, -1.0, "max", "better", "disagrees"),
        (-2.0, -1.0, "min", "worse", "disagrees"),
        (1.0, 2.0, "min", "worse", "agrees"),
        (-1.0, 2.0, "min", "worse", "null"),
        (0.0, 2.0, "max", "better", "null"),
    ],
)
def test_verdicts(low, high, best, expected, words):
    assert verdict(Interval((low + high) / 2, low, high, 5, 0.95), best=best, expected=expected) == words


def test_curves_meet_where_all_are_and_nowhere_else():
    slow = Curve(np.array([0.0, 10.0, 20.0]), np.array([4.0, 3.0, 2.0]))
    fast = Curve(np.array([5.0, 15.0, 40.0]), np.array([3.0, 2.0, 1.0]))
    points, values = shared([slow, fast], count=4)
    assert points.tolist() == [5, 10, 15, 20]
    np.testing.assert_allclose(values, [[3.5, 3, 2.5, 2], [3, 2.5, 2, 1.8]])
    assert np.isnan(fast.at(np.array([4.9, 40.1]))).all()
    assert slow.reaches(2.5) == pytest.approx(15)
    assert slow.reaches(1.0) == np.inf
    assert Curve(slow.spent, -slow.values).reaches(-2.5, best="max") == pytest.approx(15)
    with pytest.raises(UserError, match="share no budget"):
        shared([slow, Curve(np.array([21.0]), np.array([1.0]))])
    with pytest.raises(UserError, match="must rise"):
        Curve(np.array([0.0, 0.0]), np.array([1.0, 1.0]))
