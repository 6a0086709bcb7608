"""Gated DeltaNet, also as Qwen3-Next has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.initializers import normal
from models.linear import linear, side_by_side
from models.linear_attention.mixer import LinearMixer, Parts
from models.linear_attention.short_conv import ShortConvolution
from models.norms import RMSNorm
from models.variables import param
from partitioning import UserError


class GatedDeltaNet(LinearMixer):
    """Linear attention by the gated delta rule: a key's old value leaves the state as its new one comes in.

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y = (norm_h(S_t^T q_t) * silu(x W_g)) W_o;
    q = unit(conv(x W_q)) / sqrt(K), k = unit(conv(x W_k)), v = conv(x W_v), conv a `ShortConvolution`, unit(x) = x / |x|;
    b = sigmoid(x W_b), log a = -A softplus(x W_a + d) with learned A > 0 and d for each head.

    Args:
      width: D.
      heads: H, of values, gates and states.
      key_heads: heads with queries and keys of their own, each for H / key_heads heads side by side; all by default.
      head_width: K of queries and keys; 3 D / (4 H) by default.
      value_width: V of values; 2 K by default.
      size: tokens that a convolution sees.
      negative_eigenvalues: whether b = 2 sigmoid(x W_b), so that a state may turn round along a key.
      norm: a class, called with the features of one head; RMSNorm by default.
      rngs: where the initial weights come from. A begins uniform in (0.01, 16), softplus(d) log-uniform in (0.001, 0.1).

    Raises:
      UserError: heads that do not divide.

    Source: "Gated Delta Networks: Improving Mamba2 with Delta Rule", Yang et al., 2024; negative eigenvalues: "Unlocking
      State-Tracking in Linear RNNs Through Negative Eigenvalues", Grazzi et al., 2024; fewer heads of keys: Qwen3-Next,
      2025.
    Differs: A does not begin below 0.01, whose logarithm has no bound.
    """

    form = "delta"

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        key_heads: int | None = None,
        head_width: int | None = None,
        value_width: int | None = None,
        size: int = 4,
        negative_eigenvalues: bool = False,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        key_heads = heads if key_heads is None else key_heads
        if heads % key_heads:
            raise UserError(f"GatedDeltaNet.key_heads = {key_heads} does not divide heads = {heads}")
        if head_width is None and 3 * width % (4 * heads):
            raise UserError(
                f"GatedDeltaNet.heads = {heads} does not divide three quarters of the width {width}: change one, or set "
                f"head_width"
            )
        keys = 3 * width // (4 * heads) if head_width is None else head_width
        values = 2 * keys if value_width is None else value_width
        super().__init__(width, heads=heads, key_width=keys, value_width=values, rngs=rngs)
        self.key_heads, self.negative_eigenvalues = key_heads, negative_eigenvalues
        inner = lambda heads, features: param(normal(rngs, (width, heads, features)), ("embed", "heads", "kv"))
        self.query, self.key = inner(key_heads, keys), inner(key_heads, keys)
        self.value, self.gate = inner(heads, values), inner(heads, values)
        self.rate = param(normal(rngs, (width, heads)), ("embed", "heads"))
        self.decay = param(normal(rngs, (width, heads)), ("embed", "heads"))
        self.query_conv = ShortConvolution(key_heads, keys, size=size, rngs=rngs)
        self.key_conv = ShortConvolution(key_heads, keys, size=size, rngs=rngs)
        self.value_conv = ShortConvolution(heads, values, size=size, rngs=rngs)
        strength = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 0.01, 16.0)
        self.log_strength = param(jnp.log(strength), ("heads",))
        pace = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, math.log(1e-3), math.log(1e-1)))
        self.decay_bias = param(pace + jnp.log(-jnp.expm1(-pace)), ("heads",))
        self.norm: Any = (RMSNorm if norm is None else norm)(values, axis="kv")

    def parts(self, hidden: Float[Array, "B S D"], context: Any) -> tuple[Parts, dict[str, Any]]:
        """See `LinearMixer.parts`."""
        names = ("query", "key", "value")
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        of = lambda name: getattr(self, name).get_value().astype(hidden.dtype)
        *inner, rate, decay = side_by_side(hidden, [of(name) for name in (*names, "rate", "decay")])
        mixed, kept = {}, {}
        for name, x in zip(names, inner, strict=True):
            before = None if context.cache is None else context.cache[name]
            mixed[name], kept[name] = getattr(self, f"{name}_conv")(x, context, before)
        q, k = (jnp.repeat(unit(mixed[name]), self.heads // self.key_heads, axis=2) for name in ("query", "key"))
        rate = jax.nn.sigmoid(rate.astype(wide)) * (2 if self.negative_eigenvalues else 1)
        pace = jax.nn.softplus(decay.astype(wide) + self.decay_bias.get_value())
        log_decay = -jnp.exp(self.log_strength.get_value()) * pace
        return (q * self.key_width**-0.5, k, mixed["value"], rate, log_decay), kept

    def finish(self, mixed: Float[Array, "B S H V"], hidden: Float[Array, "B S D"]) -> Float[Array, "B S H V"]:
        """See `LinearMixer.finish`."""
        return self.norm(mixed) * jax.nn.silu(linear(hidden, self.gate.get_value().astype(hidden.dtype)))

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Any]:
        """A state of nothing, and no tokens that the convolutions saw."""
        sizes = {"query": (self.key_heads, self.key_width), "key": (self.key_heads, self.key_width)}
        sizes["value"] = (self.heads, self.value_width)
        convs = {name: getattr(self, f"{name}_conv").empty_cache(rows, *size, dtype) for name, size in sizes.items()}
        return super().empty_cache(rows, capacity, dtype) | convs


def unit(x: Float[Array, "*B K"], eps: float = 1e-6) -> Float[Array, "*B K"]:
    """x / sqrt(|x|^2 + eps), in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + eps)).astype(x.dtype)
