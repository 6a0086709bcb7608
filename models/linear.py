"""Products of hidden states with weights."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.few_rows import FEW, by_kernel, rows
from partitioning import is_cut


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
    flat = x.reshape(math.prod(lead), x.shape[-1])
    if by_kernel(flat, kernel):
        return rows(flat, kernel.reshape(kernel.shape[0], -1)).reshape(*lead, *trail)
    return jnp.tensordot(flat, kernel, axes=1).reshape(*lead, *trail)


def side_by_side(x: Float[Array, "*B D"], kernels: Sequence[Float[Array, "D *F"]]) -> list[Float[Array, "..."]]:
    """`linear` with several kernels, as one product.

    Kernels cut by heads stay apart and in place. So do those of few states, of which a loop over tokens would carry a second
    copy; those of a single state do not, since to begin three products takes a part of the time that they take.
    """
    if is_cut("heads") or 1 < math.prod(x.shape[:-1]) <= FEW:
        return [linear(x, kernel) for kernel in kernels]
    flat = [kernel.reshape(kernel.shape[0], -1) for kernel in kernels]
    # A split, and not slices: its gradient is one concatenation.
    parts = jax.lax.split(linear(x, jnp.concatenate(flat, axis=1)), [k.shape[1] for k in flat], axis=x.ndim - 1)
    return [part.reshape(*x.shape[:-1], *k.shape[1:]) for part, k in zip(parts, kernels, strict=True)]
