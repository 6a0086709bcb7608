"""Ranges in annotations hold wherever the object is built."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import pytest

from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Fields of every kind that a range meets."""

    share: Annotated[float, Range(0, 1)] | Callable[[Any], Any] = 0.5
    kept: Annotated[float, Range(0, 1, open="high")] | None = None
    layers: Annotated[int, Range(1)] = 1
    free: float = 0.0
    either: Annotated[float, Range(0, 1)] | int = 0  # a plain number beside a range admits any

    def __post_init__(self):
        check_fields(self)


def test_what_fits():
    Rates(share=0, kept=0.0, layers=10**9, free=-math.inf)
    Rates(share=1.0, kept=0.999)
    Rates(share=lambda step: 7)
    Rates(either=7)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"share": 1.7}, "Rates.share = 1.7: expected a number in [0, 1]"),
        ({"share": -0.1}, "Rates.share = -0.1: expected a number in [0, 1]"),
        ({"share": math.nan}, "Rates.share = nan: expected a number in [0, 1]"),
        ({"kept": 1.0}, "Rates.kept = 1.0: expected a number in [0, 1)"),
        ({"layers": 0}, "Rates.layers = 0: expected a number of at least 1"),
    ],
)
def test_what_does_not(values, words):
    with pytest.raises(UserError) as caught:
        Rates(**values)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (Range(0, 1, open=True), "in (0, 1)"),
        (Range(0, 1, open="low"), "in (0, 1]"),
        (Range(0, open=True), "above 0"),
        (Range(high=3), "of at most 3"),
        (Range(high=3, open=True), "below 3"),
    ],
)
def test_words(given, shown):
    assert str(given) == shown
    assert (given.low in given) == (given.open not in (True, "low"))
    assert (given.high in given) == (given.open not in (True, "high"))
