"""Numbers as a reader wants them."""

import pytest

from evaluation.intervals import Interval
from launch.report.numbers import bounds, number, probability, spread

INF = float("inf")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.18183, "0.1818"), (8.03539, "8.035"), (1234.56, "1,235"), (12, "12"), (-0.5, "−0.5000"), (2.53e8, "2.530e8"),
        (0.00001234, "1.234e−5"), (1e12, "1.000e12"), (80_000.0, "80,000"), (float("nan"), "–"), (None, "–"), (INF, "∞"), (0.0, "0"),
    ],
)  # fmt: skip
def test_number(value, told):
    assert number(value) == told


def test_two_digits_of_what_is_uncertain():
    assert spread(Interval(8.03539, 8.02515, 8.04563, 3, 0.95)) == "8.035 ± 0.010"
    assert spread(Interval(123.4, 100.0, 146.8, 3, 0.95)) == "123 ± 23"
    assert spread(Interval(8.0, -INF, INF, 1, 0.95)) == "8 (n = 1)"
    assert bounds(Interval(-0.0355, -0.0609, -0.0101, 3, 0.95)) == "−0.035 (−0.061 to −0.010)"
    assert bounds(Interval(0.5, -INF, INF, 1, 0.95)) == "+0.5000 (n = 1)"
    assert (probability(0.00004), probability(0.0254), probability(None)) == ("< 0.001", "0.025", "–")
