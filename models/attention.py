"""Softmax attention and its back ends."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.initializers import normal
from models.linear import linear
from models.positions import gather, rotate
from models.rope_scaling import RopeScaling
from models.variables import param
from partitioning import UserError, constrain, is_cut

Backend = Literal["xla", "reference"]


def reference(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    visible: Bool[Array, "B Q S"],
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """softmax(q kT / sqrt(K) + bias) v over the visible keys, written as on paper; a query that sees nothing gets 0."""
    return jnp.einsum("bhqs,bshk->bqhk", reference_weights(q, k, visible, bias), v)


def reference_weights(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S H K"],
    visible: Bool[Array, "B Q S"],
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B H Q S"]:
    """softmax(q kT / sqrt(K) + bias) over the visible keys."""
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / jnp.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    seen = visible[:, None]
    # Set before the exponential: of a key that is not seen it could be infinite, and its derivative 0 * infinity.
    scores = jnp.where(seen, scores, -1e30)
    weights = jnp.where(seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def xla(
    q: Float[Array, "B Q H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H K"],
    visible: Bool[Array, "B Q S"],
    bias: Float[Array, "#B #H Q S"] | None,
) -> Float[Array, "B Q H K"]:
    """The same for training: scores in float32 whatever the inputs; of the weights one array is kept for the gradient."""
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    q, k, v = heads_first(q * q.shape[-1] ** -0.5), heads_first(k), heads_first(v)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=wide)
    scores = scores if bias is None else scores + bias.astype(wide)
    weights = masked_softmax(scores, visible[:, None]).astype(v.dtype)
    return jnp.einsum("bhqs,bhsk->bhqk", weights, v, preferred_element_type=wide).astype(v.dtype).transpose(0, 2, 1, 3)


@jax.custom_jvp
def masked_softmax(scores: Float[Array, "B H Q S"], visible: Bool[Array, "B 1 Q S"]) -> Float[Array, "B H Q S"]:
    """Softmax over the visible keys, 0 elsewhere; a query that sees nothing gets 0 everywhere."""
    scores = jnp.where(visible, scores, -1e30)
    powers = jnp.where(visible, jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    total = powers.sum(-1, keepdims=True)
    return powers * (1 / jnp.where(total > 0, total, 1.0))


@masked_softmax.defjvp
def _masked_softmax_jvp(primals, tangents):
    # By the chain rule four arrays of this size would be kept, and the mask three times; the weights are all it takes.
    weights = masked_softmax(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * weighted.sum(-1, keepdims=True)


BACKENDS: dict[str, Callable[..., Float[Array, "B Q H K"]]] = {"reference": reference, "xla": xla}


def _named(name: str) -> Callable[..., Float[Array, "B Q H K"]]:
    """The product as a jitted function of this name: FLOPs are counted by half where the name says that it is causal."""

    def product(q, k, v, visible, bias, *, backend):
        return BACKENDS[backend](q, k, v, visible, bias)

    product.__name__ = product.__qualname__ = name
    return jax.jit(product, static_argnames="backend")


attention_causal, attention_full = _named("attention_causal"), _named("attention_full")


class Attention(nnx.Module):
    """Multi-head softmax attention.

    Args:
      width: D, features of the hidden states.
      heads: H; `kv_heads` of them have keys and values of their own (grouped queries), all by default.
      head_width: K; D / H by default.
      theta: base of the rotary frequencies; None for no rotation.
      scaling: of the rotary frequencies, for longer rows than were trained on.
      scale: what scores are multiplied by; 1 / sqrt(K) by default.
      qk_norm: a norm's class, for queries and keys over K before they are rotated; None for none.
      output_gate: whether the result of each head is multiplied by sigmoid(x W_gate) before the output projection.
      bias: whether the projections have biases.
      backend: how the product is computed.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide.

    Source: "Attention Is All You Need", Vaswani et al., 2017; grouped queries: "GQA", Ainslie et al., 2023.
    Differs: nothing known.
    """

    needs_causal = False

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_width: int | None = None,
        theta: float | None = 10_000.0,
        scaling: RopeScaling | None = None,
        scale: float | None = None,
        qk_norm: Callable[..., nnx.Module] | None = None,
        output_gate: bool = False,
        bias: bool = False,
        backend: Backend = "xla",
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if head_width is None and width % heads:
            raise UserError(
                f"Attention.heads = {heads} does not divide the width {width}: change one, or set head_width"
            )
        if heads % kv_heads:
            raise UserError(f"Attention.kv_heads = {kv_heads} does not divide heads = {heads}")
        self.heads, self.kv_heads, self.theta, self.backend = heads, kv_heads, theta, backend
        self.head_width = width // heads if head_width is None else head_width
        self.scaling = nnx.static(scaling)
        # The back ends divide by sqrt(K); another scale goes into the queries.
        self.query_scale = None if scale is None else scale * math.sqrt(self.head_width)
        inner = ("embed", "heads", "kv")
        self.query = param(normal(rngs, (width, heads, self.head_width)), inner)
        self.key = param(normal(rngs, (width, kv_heads, self.head_width)), inner)
        self.value = param(normal(rngs, (width, kv_heads, self.head_width)), inner)
        self.out = param(normal(rngs, (heads, self.head_width, width)), ("heads", "kv", "embed"))
        self.gate = param(normal(rngs, (width, heads, self.head_width)), inner) if output_gate else None
        self.query_norm: Any = None if qk_norm is None else qk_norm(self.head_width, axis="kv")
        self.key_norm: Any = None if qk_norm is None else qk_norm(self.head_width, axis="kv")
        self.query_bias = param(jnp.zeros((heads, self.head_width)), ("heads", "kv")) if bias else None
        self.key_bias = param(jnp.zeros((kv_heads, self.head_width)), ("heads", "kv")) if bias else None
        self.value_bias = param(jnp.zeros((kv_heads, self.head_width)), ("heads", "kv")) if bias else None
        self.out_bias = param(jnp.zeros((width,)), ("embed",)) if bias else None

    def __call__(
        self, hidden: Float[Array, "B S D"], context: Any
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Array]]:
        """Mixes tokens; returns the result, the new cache entry (None without a cache) and the weights, if asked for.

        With `context.memory` the keys and values come from there, with `context.at` there are queries at those slots only.
        """
        source, at = hidden if context.memory is None else context.memory, context.at
        visible, bias, places = context.visible, context.bias, context.positions
        if at is not None:
            hidden, visible, places = gather(hidden, at), gather(visible, at), gather(places, at)
            bias = bias if bias is None else jnp.take_along_axis(bias, at[:, None, :, None], axis=2)
        q, k, v = self._project(hidden, source)
        q, k = (x if norm is None else norm(x) for x, norm in ((q, self.query_norm), (k, self.key_norm)))
        if self.theta is not None and context.memory is None:
            q = rotate(q, places, self.theta, self.scaling)
            k = rotate(k, context.positions, self.theta, self.scaling)
        q = q if self.query_scale is None else q * self.query_scale
        cache = None
        if context.cache is not None:
            # Kept by heads, as the product reads them: turned over in each step they would be copied in each.
            turn = lambda x: x.swapaxes(1, 2)
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=context.cache_length, axis=2)
            cache = {
                name: write(context.cache[name], turn(new).astype(context.cache[name].dtype))
                for name, new in (("key", k), ("value", v))
            }
            k, v = turn(cache["key"]), turn(cache["value"])
        # All that a group asks at one slot it may ask as several queries of its head: keys are read once, not repeated.
        asks_together = q.shape[1] == 1 and bias is None and "attention" not in context.taps
        if self.kv_heads != self.heads and asks_together:
            q = q.reshape(len(q), self.kv_heads, -1, self.head_width).swapaxes(1, 2)
        elif self.kv_heads != self.heads:
            k, v = (jnp.repeat(x, self.heads // self.kv_heads, axis=2) for x in (k, v))
        product = attention_causal if context.causal else attention_full
        mixed = product(q, k, v, visible, bias, backend=self.backend)
        if q.shape[2] != self.heads:
            mixed = mixed.swapaxes(1, 2).reshape(len(q), 1, self.heads, self.head_width)
        # No back end hands its weights out: they are computed again for those who look.
        taps = {"attention": reference_weights(q, k, visible, bias)} if "attention" in context.taps else {}
        mixed = constrain(mixed, "batch", "length", "heads", "kv")
        if self.gate is not None:
            gate = self.gate.get_value().astype(hidden.dtype)
            mixed = mixed * jax.nn.sigmoid(linear(hidden, gate.reshape(gate.shape[0], -1)).reshape(mixed.shape))
        kernel = self.out.get_value().astype(hidden.dtype)
        out = linear(mixed.reshape(*mixed.shape[:2], -1), kernel.reshape(-1, kernel.shape[-1]))
        return (out if self.out_bias is None else out + self.out_bias.get_value().astype(hidden.dtype)), cache, taps

    def _project(self, hidden, source):
        """Queries, keys and values; one matrix product where all three have the same source."""
        cast = lambda p: p.get_value().astype(hidden.dtype)
        kernels = [cast(self.query), cast(self.key), cast(self.value)]
        biases = [None if p is None else cast(p) for p in (self.query_bias, self.key_bias, self.value_bias)]
        flat = lambda w: w.reshape(w.shape[0], -1)
        if source is hidden and not is_cut("heads"):
            # A split, and not slices: its gradient is one concatenation. Kernels cut by heads stay apart and in place.
            sizes = [math.prod(w.shape[1:]) for w in kernels]
            parts = jax.lax.split(linear(hidden, jnp.concatenate([flat(w) for w in kernels], axis=1)), sizes, axis=2)
        else:
            parts = [linear(x, flat(w)) for x, w in zip((hidden, source, source), kernels, strict=True)]
        parts = [p.reshape(*p.shape[:2], *w.shape[1:]) for p, w in zip(parts, kernels, strict=True)]
        parts = [p if b is None else p + b for p, b in zip(parts, biases, strict=True)]
        return [constrain(p, "batch", "length", "heads", "kv") for p in parts]

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Array]:
        """Room for the keys and values of `capacity` tokens."""
        shape = (rows, self.kv_heads, capacity, self.head_width)
        return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
