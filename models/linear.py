"""Products of hidden states with weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from partitioning import is_cut

# Up to so many states weights come first in a product, their summed dimension last: as the second side XLA for CPU would pack
# them anew each time.
FEW = 64
_repeated = ContextVar("repeated", default=False)


@contextmanager
def repeated() -> Iterator[None]:
    """A loop's body: its products are done again and again with the same kernels, so turning those round once pays."""
    token = _repeated.set(True)
    try:
        yield
    finally:
        _repeated.reset(token)


def linear(x: Float[Array, "*B D"], kernel: Float[Array, "D *F"]) -> Float[Array, "..."]:
    """y_bf = sum_d x_bd kernel_df, over tokens as one long dimension.

    The kernel's gradient sums over every dimension of the tokens. With one such dimension the compiler multiplies what is
    there; with two, XLA for CPU first writes transposed copies of both sides. Where a mesh cuts the rows they stay cut, as
    the first of the joined dimensions; where it cuts the length too, joining would gather it, and nothing is joined.

    Args:
      x: hidden states, `[..., D]`.
      kernel: `[D, ...]`.
    """
    lead, trail = x.shape[:-1], kernel.shape[1:]
    if len(lead) < 2 or is_cut("length"):
        return jnp.tensordot(x, kernel, axes=1)
    states = math.prod(lead)
    flat = x.reshape(states, x.shape[-1])
    if _repeated.get() and 1 < states <= FEW:
        matrix = kernel.reshape(kernel.shape[0], -1)
        return jax.lax.platform_dependent(flat, matrix, cpu=_turned, default=jnp.matmul).reshape(*lead, *trail)
    return jnp.tensordot(flat, kernel, axes=1).reshape(*lead, *trail)


def _turned(x: Float[Array, "B D"], kernel: Float[Array, "D F"]) -> Float[Array, "B F"]:
    """(kernel^T x^T)^T. What is turned round before the loop lies behind a barrier, or the product takes it back."""
    turned = jax.lax.optimization_barrier(kernel.T)
    product = jax.lax.dot_general(turned, x, (((1,), (1,)), ((), ())))
    return jax.lax.optimization_barrier(product).T


def side_by_side(x: Float[Array, "*B D"], kernels: Sequence[Float[Array, "D *F"]]) -> list[Float[Array, "..."]]:
    """`linear` with several kernels, as one product; kernels cut by heads stay apart and in place."""
    if is_cut("heads"):
        return [linear(x, kernel) for kernel in kernels]
    flat = [kernel.reshape(kernel.shape[0], -1) for kernel in kernels]
    # A split, and not slices: its gradient is one concatenation.
    parts = jax.lax.split(linear(x, jnp.concatenate(flat, axis=1)), [k.shape[1] for k in flat], axis=x.ndim - 1)
    return [part.reshape(*x.shape[:-1], *k.shape[1:]) for part, k in zip(parts, kernels, strict=True)]
