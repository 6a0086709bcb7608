"""Singular vectors from rotations of pairs of rows, on any device: no decomposition of a linear algebra library."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SWEEPS = 40  # Where it ends if rounding never lets it end; 6 to 12 are usual.


def circle(size: int) -> Int[np.ndarray, "size"]:
    """Where each place's row comes from in the next round of a tournament, place i playing place i + size / 2.

    The first stands still and all others go round; after size - 1 rounds each has met each and is where it was.
    """
    half = size // 2
    order = np.r_[:half, size - 1 : half - 1 : -1]
    source = np.empty(size, int)
    source[order] = np.r_[order[:1], np.roll(order[1:], 1)]
    return source


def singular(matrices: Float[Array, "... k n"]) -> tuple[Float[Array, "... k k"], Float[Array, "... k"]]:
    """The left singular vectors by falling singular value, and the values, of matrices with k <= n.

    One-sided Jacobi: pairs of rows of G are rotated until all are orthogonal, U^T G = S V^T. A round rotates k / 2 pairs
    at once, a sweep is k - 1 rounds in which each row meets each. What is found for a matrix does not depend on those it
    is stacked with. On CPU it takes five to seven times as long as LAPACK, whose kernels jaxlib calls by a wait in a
    thread of the very pool that is to do the work: with one program a device in that pool, all may wait for ever.

    Args:
      matrices: G.

    Returns:
      U, orthogonal also where G has less than k singular values, each column's entry of largest magnitude positive, so
      that only equal values leave it undetermined; S, in which what is not above rounding (n eps |G|) is 0.

    Source: One-sided method for the computation of the singular value decomposition, Hestenes, 1958; the order of a
      round is that of The solution of singular-value and symmetric eigenvalue problems on multiprocessor arrays, Brent
      and Luk, 1985.
    Differs: a step of Newton-Schulz at the end takes away what the rotations' rounding added up to.
    """
    *batch, k, n = matrices.shape
    half, order, eps = (k + 1) // 2, circle(k + k % 2), float(jnp.finfo(matrices.dtype).eps)
    # Squares neither overflow nor vanish.
    largest = jnp.abs(matrices).max((-2, -1), keepdims=True)
    scaled = matrices / jnp.where(largest > 0, largest, 1)
    rounding = n * eps * jnp.linalg.norm(scaled, axis=(-2, -1))[..., None]
    # The identity beside G collects the rotations; an odd k gets a row of zeros, which nothing rotates.
    rows = jnp.concatenate([scaled, jnp.broadcast_to(jnp.eye(k, dtype=scaled.dtype), (*batch, k, k))], -1)
    rows = jnp.pad(rows, [(0, 0)] * len(batch) + [(0, k % 2), (0, 0)])

    def turn(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, turned = carry
        one, other = rows[..., :half, :], rows[..., half:, :]
        inner = lambda x, y: (x[..., :n] * y[..., :n]).sum(-1)
        a, b, c = inner(one, one), inner(other, other), inner(one, other)
        due = (jnp.abs(c) > eps * n**0.5 * jnp.sqrt(a * b)) & (jnp.minimum(a, b) > rounding**2)
        # The smaller of the two angles that make the rows orthogonal.
        ratio = (b - a) / (2 * jnp.where(due, c, 1))
        tangent = jnp.where(ratio < 0, -1, 1) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio**2))
        tangent = jnp.where(due, tangent, 0)[..., None]
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        pairs = [cosine * (one - tangent * other), cosine * (tangent * one + other)]
        return jnp.concatenate(pairs, -2)[..., order, :], turned | due.any()

    def sweep(carry: tuple[Array, Bool[Array, ""], Array]) -> tuple[Array, Bool[Array, ""], Array]:
        rows, _, sweeps = carry
        rows, turned = jax.lax.fori_loop(0, len(order) - 1, turn, (rows, jnp.zeros((), bool)))
        return rows, turned, sweeps + 1

    start = (rows, jnp.ones((), bool), jnp.zeros((), jnp.int32))
    rows, *_ = jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < SWEEPS), sweep, start)
    product = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    vectors = rows[..., :k, n:].mT
    vectors = 1.5 * vectors - 0.5 * product(vectors, product(vectors.mT, vectors))
    values = jnp.linalg.norm(product(vectors.mT, scaled), axis=-1)
    values = jnp.where(values > rounding, values, 0)
    falling = jnp.argsort(-values, axis=-1)
    vectors = jnp.take_along_axis(vectors, falling[..., None, :], -1)
    peak = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(-2, keepdims=True), -2)
    values = jnp.take_along_axis(values, falling, -1) * largest[..., 0]
    return jnp.where(peak < 0, -vectors, vectors), values
