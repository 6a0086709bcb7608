"""The three products of two matrices, each with gradients that are two of the three, in the order that a processor is fast at.

XLA for CPU hands a product to its fast library only where the left side is added up along its last dimension; what autodiff
writes, x^T y with x as it lies, goes to a loop that takes three times as long.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from partitioning import platform


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def nn(a: Float[Array, "*B I J"], b: Float[Array, "*B J K"], wide: jnp.dtype) -> Float[Array, "*B I K"]:
    """a b, added up in `wide`, which is the result's type; gradients have the types of a and b."""
    return jnp.matmul(a, b, preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def nt(a: Float[Array, "*B I J"], b: Float[Array, "*B K J"], wide: jnp.dtype) -> Float[Array, "*B I K"]:
    """a b^T, as `nn`."""
    return jnp.matmul(a, b.swapaxes(-1, -2), preferred_element_type=wide)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def tn(a: Float[Array, "*B J I"], b: Float[Array, "*B J K"], wide: jnp.dtype) -> Float[Array, "*B I K"]:
    """a^T b, as `nn`; on a CPU a^T is an array of its own."""
    a = a.swapaxes(-1, -2)
    return jnp.matmul(jax.lax.optimization_barrier(a) if platform() == "cpu" else a, b, preferred_element_type=wide)


def _written(product, gradients):
    keep = lambda a, b, wide: (product(a, b, wide), (a, b))

    def back(wide, kept, slope):
        return tuple(d.astype(x.dtype) for d, x in zip(gradients(*kept, slope, wide), kept, strict=True))

    product.defvjp(keep, back)


_written(nn, lambda a, b, d, wide: (nt(d, b, wide), tn(a, d, wide)))
_written(nt, lambda a, b, d, wide: (nn(d, b, wide), tn(d, a, wide)))
_written(tn, lambda a, b, d, wide: (nt(b, d, wide), nn(a, d, wide)))
