"""Softmax attention: projections, the cache, and one call to a back end."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.backends.cudnn import cudnn
from models.backends.reference import reference, reference_weights
from models.backends.splash import splash
from models.backends.view import Keys, View
from models.backends.xla import xla
from models.few_rows import kernels
from models.initializers import normal
from models.linear import linear, side_by_side
from models.positions import few, gather, rotate
from models.rope_scaling import RopeScaling
from models.variables import param
from partitioning import UserError, constrain, is_cut

Backend = Literal["xla", "reference", "cudnn", "splash"]
BACKENDS: dict[str, Callable[..., Float[Array, "B Q H K"]]] = {
    "reference": reference,
    "xla": xla,
    "cudnn": cudnn,
    "splash": splash,
}


def _named(name: str) -> Callable[..., Float[Array, "B Q H K"]]:
    """The product as a jitted function of this name: FLOPs are counted by half where the name says that it is causal."""

    def product(q, k, v, view, bias, *, backend, kernels):
        del kernels  # What is traced here depends on it: without it jit would take one for the other.
        return BACKENDS[backend](q, k, v, view, bias)

    product.__name__ = product.__qualname__ = name
    traced = jax.jit(product, static_argnames=("backend", "kernels"))
    return lambda *arrays, backend: traced(*arrays, backend=backend, kernels=kernels())


attention_causal, attention_full = _named("attention_causal"), _named("attention_full")


# How a cache has the axes of [B, S, H, K]: by heads, and each as its product reads it. Turned over in every step they would
# be copied in every step.
KEPT = {"key": (0, 2, 3, 1), "value": (0, 2, 1, 3)}


def kept(x: Float[Array, "B S H K"], name: str) -> Array:
    """Keys or values as a cache has them."""
    return x.transpose(KEPT[name])


def taken(x: Array, name: str) -> Float[Array, "B S H K"]:
    """The inverse of `kept`."""
    return x.transpose([KEPT[name].index(axis) for axis in range(4)])


class Attention(nnx.Module):
    """Multi-head softmax attention.

    Args:
      width: D, features of the hidden states.
      heads: H; `kv_heads` of them have keys and values of their own (grouped queries), all by default.
      head_width: K; D / H by default.
      theta: base of the rotary frequencies; None for no rotation.
      rotary: share of the features of a head that is rotated.
      scaling: of the rotary frequencies, for longer rows than were trained on.
      scale: what scores are multiplied by; 1 / sqrt(K) by default.
      qk_norm: a norm's class, for queries and keys before they are rotated; None for none.
      qk_norm_over: what that norm goes over: the K features of one 'head', or those of all 'heads' at once (OLMoE).
      output_gate: whether the result of each head is multiplied by sigmoid(x W_gate) before the output projection.
      bias: whether the projections have biases.
      backend: how the product is computed, see docs/masks.md; what one cannot express it refuses.
      rngs: where the initial weights come from.

    Raises:
      UserError: heads that do not divide, or an odd number of rotated features.

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
        rotary: float = 1.0,
        scaling: RopeScaling | None = None,
        scale: float | None = None,
        qk_norm: Callable[..., nnx.Module] | None = None,
        qk_norm_over: Literal["head", "heads"] = "head",
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
        self.rotated = int(rotary * self.head_width)
        if not 0 < rotary <= 1 or (rotary < 1 and self.rotated % 2):
            raise UserError(
                f"Attention.rotary = {rotary} turns {self.rotated} of the {self.head_width} features of a head: expected an "
                f"even number, at most all"
            )
        self.scaling = nnx.static(scaling)
        # The back ends divide by sqrt(K); another scale goes into the queries.
        self.query_scale = None if scale is None else scale * math.sqrt(self.head_width)
        inner = ("embed", "heads", "kv")
        self.query = param(normal(rngs, (width, heads, self.head_width)), inner)
        self.key = param(normal(rngs, (width, kv_heads, self.head_width)), inner)
        self.value = param(normal(rngs, (width, kv_heads, self.head_width)), inner)
        self.out = param(normal(rngs, (heads, self.head_width, width)), ("heads", "kv", "embed"))
        self.gate = param(normal(rngs, (width, heads, self.head_width)), inner) if output_gate else None
        self.qk_norm_over = qk_norm_over

        def norm(heads: int) -> Any:
            if qk_norm is None:
                return None
            one = qk_norm_over == "head"
            return qk_norm(self.head_width, axis="kv") if one else qk_norm(heads * self.head_width, axis="heads")

        self.query_norm, self.key_norm = norm(heads), norm(kv_heads)
        self.query_bias = param(jnp.zeros((heads, self.head_width)), ("heads", "kv")) if bias else None
        self.key_bias = param(jnp.zeros((kv_heads, self.head_width)), ("heads", "kv")) if bias else None
        self.value_bias = param(jnp.zeros((kv_heads, self.head_width)), ("heads", "kv")) if bias else None
        self.out_bias = param(jnp.zeros((width,)), ("embed",)) if bias else None

    def __call__(
        self, hidden: Float[Array, "B S D"], context: Any
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Array]]:
        """Mixes tokens; returns the result, the new cache entry (None without a cache) and the weights, if asked for.

        With `context.source` the keys and values come from there, with `context.at` there are queries at those slots only.
        """
        source, at = hidden if context.source is None else context.source, context.at
        visible, bias, places = context.visible, context.bias, context.positions
        if at is not None:
            hidden, visible, places = gather(hidden, at), gather(visible, at), gather(places, at)
            bias = bias if bias is None else jnp.take_along_axis(bias, at[:, None, :, None], axis=2)
        q, k, v = self._turned(self._project(hidden, source, at), places, context)
        cache = None
        if context.cache is not None:
            cache = {
                name: _with(context.cache[name], kept(new, name), context.cache_length, axis=KEPT[name].index(1))
                for name, new in (("key", k), ("value", v))
            }
            k, v = (taken(cache[name], name) for name in ("key", "value"))
        bias = self._bias(q, k, bias, context)
        keys: Keys = "cache" if cache is not None else "row" if context.source is None else "memory"
        view = View(visible, context.mask, context.segments, context.positions, at, keys)
        with few(at):
            out, taps = self._mixed(hidden, q, k, v, view, bias, causal=context.causal, taps=context.taps)
        return out, cache, taps

    def _turned(self, parts, places, context):
        """Queries, keys and values, the first two normed and rotated."""
        q, k, v = parts
        q, k = self._normed(q, self.query_norm), self._normed(k, self.key_norm)
        if self.theta is not None and context.source is None:
            q = rotate(q, places, self.theta, self.scaling, self.rotated)
            k = rotate(k, context.positions, self.theta, self.scaling, self.rotated)
        return q, k, v

    def _normed(self, x, norm):
        if norm is None or self.qk_norm_over == "head":
            return x if norm is None else norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _bias(self, q, k, bias, context):
        """What is added to the scores; a kind of attention may add its own."""
        del q, k, context
        return bias

    def _mixed(self, hidden, q, k, v, view, bias, *, causal, taps):
        """The product, gated and projected; and the weights, if asked for."""
        # Where rows are cut along their length, queries stay where they are and see the keys of the whole row.
        k, v = (constrain(x, "batch", None, "heads", "kv") for x in (k, v))
        q = q if self.query_scale is None else q * self.query_scale
        product = attention_causal if causal else attention_full
        mixed = product(q, k, v, view, bias, backend=self.backend)
        # No back end hands its weights out: they are computed again for those who look.
        tapped = {"attention": reference_weights(q, k, view.visible, bias)} if "attention" in taps else {}
        return self._joined(hidden, mixed), tapped

    def _joined(self, hidden, mixed):
        """What the heads found, gated and projected."""
        mixed = constrain(mixed, "batch", "length", "heads", "kv")
        if self.gate is not None:
            gate = self.gate.get_value().astype(hidden.dtype)
            mixed = mixed * jax.nn.sigmoid(linear(hidden, gate.reshape(gate.shape[0], -1)).reshape(mixed.shape))
        out = linear(mixed.reshape(*mixed.shape[:2], -1), self._flat("out", hidden.dtype))
        return out if self.out_bias is None else out + self.out_bias.get_value().astype(hidden.dtype)

    def _project(self, hidden, source, at):
        """Queries, keys and values; one matrix product where all three have the same source."""
        names = ("query", "key", "value")
        if source is not hidden or is_cut("heads"):
            # Kernels cut by heads stay apart and in place.
            with few(at):
                query = self._part(hidden, "query")
            return [query, *(self._part(source, name) for name in names[1:])]
        parts = side_by_side(hidden, [self._flat(name, hidden.dtype) for name in names])
        return [_cut(self._heads(part, name)) for part, name in zip(parts, names, strict=True)]

    def _part(self, x, name):
        """Queries, keys or values by themselves."""
        return _cut(self._heads(linear(x, self._flat(name, x.dtype)), name))

    def _flat(self, name, dtype):
        """A projection as a matrix: to heads or from them."""
        kernel = getattr(self, name).get_value().astype(dtype)
        return kernel.reshape(-1, kernel.shape[-1]) if name == "out" else kernel.reshape(kernel.shape[0], -1)

    def _heads(self, part, name):
        bias = getattr(self, f"{name}_bias")
        part = part.reshape(*part.shape[:2], -1, self.head_width)
        return part if bias is None else part + bias.get_value().astype(part.dtype)

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Array]:
        """Room for the keys and values of `capacity` tokens."""
        shape = (rows, capacity, self.kv_heads, self.head_width)
        return {name: kept(jnp.zeros(shape, dtype), name) for name in ("key", "value")}


def _cut(x: Float[Array, "B S H K"]) -> Float[Array, "B S H K"]:
    return constrain(x, "batch", "length", "heads", "kv")


def _with(old: Array, new: Array, start: Any, axis: int) -> Array:
    """What a cache has of keys or values, with new ones from a slot on."""
    new = new.astype(old.dtype)
    if len(old) > 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=axis)
    # Of a single row XLA for CPU drops the axis of rows, and an update that still has it is no longer made in place.
    return jax.lax.dynamic_update_slice_in_dim(old[0], new[0], start, axis=axis - 1)[None]
