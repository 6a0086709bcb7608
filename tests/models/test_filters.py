"""Filters of logits against a few lines of numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra.numpy import arrays

from models.decoding import MinP, TopK, TopP
from partitioning import UserError

ROWS, V = 3, 7
# Few values, so that there are ties.
LOGITS = arrays(np.float64, (ROWS, V), elements=some.integers(-6, 6).map(lambda n: n / 2))
KEEP = {
    TopK: lambda row, p, k: {i for i, x in enumerate(row) if (row > x).sum() < k},
    # What is as likely as the last that stays, stays; sums that only rounding tells from p are left out of the test.
    TopP: lambda row, p, k: {i for i, x in enumerate(row) if chances(row)[row > x].sum() < p} | set(best(row)),
    MinP: lambda row, p, k: {i for i, x in enumerate(row) if chances(row)[i] >= p * chances(row).max()},
}


def chances(row):
    """Their softmax."""
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def best(row):
    """Where the largest are."""
    return np.flatnonzero(row == row.max())


@pytest.mark.parametrize("kind", [TopK, TopP, MinP])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(logits=LOGITS, p=some.floats(0, 1), k=some.integers(1, V + 2))
def test_what_stays(kind, logits, p, k):
    """The tokens of the definition with their scores; the others at minus infinity."""
    with jax.enable_x64(True):
        keep = TopK(k=k) if kind is TopK else kind(p=p)
        found = np.asarray(keep(jnp.asarray(logits)))
    for row, kept in zip(logits, found, strict=True):
        sums = [chances(row)[row > x].sum() for x in row]
        if kind is TopP and np.abs(np.array(sums) - p).min() < 1e-9:
            continue
        if kind is MinP and np.abs(chances(row) - p * chances(row).max()).min() < 1e-9:
            continue
        stays = KEEP[kind](row, p, k)
        assert set(np.flatnonzero(np.isfinite(kept))) == stays
        np.testing.assert_array_equal(kept[list(stays)], row[list(stays)])


@pytest.mark.parametrize("keep", [TopK(k=V), TopK(k=V + 5), TopP(p=1.0), MinP(p=0.0)], ids=repr)
def test_what_keeps_all(keep):
    """Bit for bit, even where the tail is next to nothing."""
    logits = np.array([[0.0, -60.0, -1e4, 3.0, 3.0, -200.0, 1.0]], np.float32)
    np.testing.assert_array_equal(keep(jnp.asarray(logits)), logits)


@pytest.mark.parametrize("keep", [TopP(p=0.0), MinP(p=1.0), TopK(k=1)], ids=repr)
def test_what_keeps_the_best(keep):
    """All that are best."""
    found = np.asarray(keep(jnp.asarray([[1.0, 4.0, 2.0, 4.0]])))
    np.testing.assert_array_equal(np.isfinite(found), [[False, True, False, True]])


@pytest.mark.parametrize(("kind", "value"), [(TopK, {"k": 0}), (TopP, {"p": 1.5}), (MinP, {"p": -0.1})])
def test_ranges(kind, value):
    """An error that names the argument."""
    with pytest.raises(UserError, match=f"{kind.__name__}.{next(iter(value))}"):
        kind(**value)
