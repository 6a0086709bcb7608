"""Singular vectors by rotations against LAPACK's in float64, of all shapes and ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.singular import circle, singular

find = jax.jit(singular)


def matrix(seed, k, n, values=None):
    """A random matrix; of these singular values, if any are given."""
    draw = np.random.default_rng(seed).standard_normal((k, n))
    if values is None:
        return draw
    u, _, v = np.linalg.svd(draw, full_matrices=False)
    return (u * np.asarray(values)) @ v


def check(x, precision, gap=0.0):
    """Orthogonal vectors, values by falling size, and each vector LAPACK's (or minus it) where its value stands alone."""
    u, s = (np.asarray(y) for y in find(jnp.asarray(x)))
    expected, values, _ = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    np.testing.assert_allclose(u.T @ u, np.eye(len(u)), atol=precision)
    np.testing.assert_allclose(s, values, atol=precision * values[0])
    rows = u.T @ np.asarray(x, np.float64)
    # U^T G has orthogonal rows of those lengths: with an orthogonal U that is the decomposition.
    np.testing.assert_allclose(rows @ rows.T, np.diag(values**2), atol=precision * values[0] ** 2)
    alone = np.abs(np.subtract.outer(values, values) + np.diag(np.full(len(values), np.inf))).min(0) > gap * values[0]
    np.testing.assert_allclose(np.abs((u * expected).sum(0))[alone], 1, atol=precision)
    peaks = np.abs(u).argmax(0)
    assert (u[peaks, np.arange(len(u))] > 0).all()
    return u


def test_in_a_sweep_each_row_meets_each_and_comes_home():
    for size in (2, 4, 10):
        places, met = np.arange(size), set()
        for _ in range(size - 1):
            met |= {frozenset(pair) for pair in zip(places[: size // 2], places[size // 2 :], strict=True)}
            places = places[circle(size)]
        assert len(met) == size * (size - 1) // 2
        np.testing.assert_array_equal(places, np.arange(size))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (3, 7), (5, 5), (16, 40), (33, 33)])
def test_it_is_the_decomposition(shape):
    with jax.enable_x64(True):
        check(matrix(0, *shape), 1e-11, 1e-3)
    check(matrix(0, *shape).astype(np.float32), 3e-5, 1e-1)


def test_small_values_are_as_exact_as_large_ones():
    """Where G G^T would lose what is below 1e-8 of the largest."""
    with jax.enable_x64(True):
        check(matrix(1, 6, 9, [1, 1e-2, 1e-5, 1e-8, 1e-10, 1e-12]), 1e-14 / 1e-3)
        u = check(np.diag(10.0 ** np.arange(-12, 0)) @ matrix(2, 12, 12), 1e-11)
        assert np.isfinite(u).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_size_does_not_matter(scale):
    x = jnp.asarray(matrix(3, 6, 8), jnp.float32)
    one, other = find(x), find(x * jnp.float32(scale))
    np.testing.assert_allclose(other[0], one[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other[1] / np.float32(scale), one[1], rtol=1e-5)


@pytest.mark.parametrize(
    "values", [(5, 3, 0, 0, 0), (1, 0, 0, 0, 0), (2, 2, 2, 1, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)]
)
def test_a_basis_is_whole_at_any_rank(values):
    """The vectors of values that are 0 or equal are any, but orthogonal, and the same whatever the stack."""
    with jax.enable_x64(True):
        x = matrix(4, 5, 8, values)
        u, s = find(jnp.asarray(x))
        np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-14)
        np.testing.assert_allclose(s, values, atol=1e-13)
        assert (np.asarray(s)[np.asarray(values) == 0] == 0).all()
        for value in set(values):
            at = np.asarray(values) == value
            expected = np.linalg.svd(x)[0][:, at]
            np.testing.assert_allclose(u[:, at] @ u[:, at].T, expected @ expected.T, atol=1e-13)
        # Nor does the last bit decide which vectors those of 0 are.
        near = x * (1 + 1e-15 * np.random.default_rng(6).standard_normal(x.shape))
        if len(set(values)) > 1:
            none = np.asarray(values) == 0
            np.testing.assert_allclose(find(jnp.asarray(near))[0][:, none], u[:, none], atol=1e-12)
        stack = find(jnp.stack([jnp.asarray(matrix(5, 5, 8)), jnp.asarray(x), jnp.zeros((5, 8))]))
        np.testing.assert_allclose(stack[0][1], u, atol=1e-13)


def test_a_stack_is_its_matrices():
    """To the bit: one that is done does not turn while others still do."""
    stack = jnp.asarray(
        [matrix(seed, 6, 6, 10.0 ** -(np.arange(6) ** p)) for seed, p in ((6, 0.5), (7, 1.5))], jnp.float32
    )
    stack = jnp.stack([stack[0], jnp.eye(6), stack[1]])[:, None]
    vectors, values = find(stack)
    for place in range(3):
        one = find(stack[place, 0])
        np.testing.assert_array_equal(vectors[place, 0], one[0])
        np.testing.assert_array_equal(values[place, 0], one[1])


def test_many_roundings_do_not_add_up():
    """Of 1,600 rotations of each row."""
    u, _ = find(jnp.asarray(matrix(8, 160, 160), jnp.float32))
    np.testing.assert_allclose(u.T @ u, np.eye(160), atol=2e-6)
