"""cuDNN's fused attention, for NVIDIA GPUs."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.backends.view import View, refuse
from partitioning import is_cut, platform


def cudnn(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """The product on an NVIDIA GPU, without the matrix of scores in memory; the mask goes in as a matrix.

    Raises:
      UserError: another platform, rows cut along their length, other numbers than float16 and bfloat16, or a head's width
        that is no multiple of 8.
    """
    if platform() != "gpu":
        refuse("cudnn", f"on the platform '{platform()}', it needs an NVIDIA GPU")
    if is_cut("length"):
        refuse("cudnn", "rows that are cut along their length")
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        refuse("cudnn", f"in {q.dtype}, its numbers are bfloat16: set Trunk.dtype = 'bfloat16'")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        refuse("cudnn", f"heads of width {q.shape[-1]}, a width is a multiple of 8 and at most 256")
    return product(q, k, v, view, bias, implementation="cudnn")


def product(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    view: View,
    bias: Float[Array, "#B #H Q S"] | None,
    *,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B Q H K"]:
    """What `jax.nn.dot_product_attention` is asked for; its XLA form takes the same arguments on every platform."""
    queries, keys = q.shape[1], k.shape[1]
    # With a mask its gradient takes even lengths only.
    even = lambda x, *axes: jnp.pad(x, [(0, x.shape[i] % 2 if i in axes else 0) for i in range(x.ndim)])
    visible = even(view.visible[:, None], 2, 3)
    mixed = jax.nn.dot_product_attention(
        even(q, 1),
        even(k, 1),
        even(v, 1),
        bias if bias is None else even(bias, 2, 3).astype(q.dtype),
        visible,
        # Said again, for blocks above the diagonal are then left out.
        is_causal=view.mask.causal and view.keys == "row" and queries == keys and view.at is None,
        implementation=implementation,
    )
    # A query that sees nothing would get the mean of all values, of other documents too.
    return jnp.where(visible.any(-1)[:, 0, :, None, None], mixed, 0)[:, :queries]
