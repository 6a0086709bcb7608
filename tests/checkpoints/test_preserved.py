"""Which checkpoints stay."""

from types import SimpleNamespace

import pytest

from checkpoints.preserved import Preserved

FIGURES = {10: float("nan"), 20: 0.9, 30: 0.5, 40: 0.9, 50: 0.2}


@pytest.mark.parametrize(
    ("best", "expected"),
    [(None, [60, 70]), (("loss", "min"), [50, 60, 70]), (("loss", "max"), [20, 60, 70]), (("other", "max"), [60, 70])],
)
def test_the_newest_and_the_best(best, expected):
    """Those without a figure, or with NaN, are never best; of equals the first is."""
    preserved = Preserved(2, best)
    for step, value in FIGURES.items():
        preserved.note(step, {"figures": {"loss": value}})
    preserved.note(60, {})
    steps = list(range(10, 80, 10))
    kept = preserved.should_preserve([SimpleNamespace(step=step) for step in steps], context=None)
    assert [step for step, keep in zip(steps, kept, strict=True) if keep] == expected
