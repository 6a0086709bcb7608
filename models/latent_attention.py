"""Softmax attention whose keys and values are read from one short vector a token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.attention import Backend, attention_causal, attention_full
from models.backends.reference import reference_weights
from models.backends.view import Keys, View
from models.initializers import normal
from models.linear import linear, side_by_side
from models.norms import RMSNorm
from models.positions import few, gather, rotate
from models.rope_scaling import RopeScaling
from models.variables import param
from partitioning import UserError, constrain

# Back ends whose kernels take values of the keys' width alone.
ONE_WIDTH = ("cudnn", "splash")


class LatentAttention(nnx.Module):
    """Multi-head attention whose keys and values are made from one low-rank latent a token, which is all a cache keeps.

    c = norm(x W_c), r = rotated(x W_r);  k_h = [c K_h, r], v_h = c V_h;  q_h = [n_h, rotated(t_h)], (n_h, t_h) of
    norm(x W_q) Q_h, or of x Q_h;  y = sum_h softmax(q_h k_hT / sqrt(plain + rotary)) v_h O_h. The rotary key r is the same for
    all heads. Keys and values are expanded from the latents in every call, in decoding too. The factor of a `scaling` that
    sharpens attention (YaRN) goes for whole queries and keys, the parts without positions included.

    Args:
      width: D, features of the hidden states.
      heads: H.
      query_rank: features of the queries' latent; None for queries straight from the states.
      rank: features of c, the latent of keys and values.
      plain, rotary: features of a head's queries and keys without and with positions.
      value_width: features of a head's values.
      theta, scaling: base of the rotary frequencies, and what scales them.
      backend: how the product is computed, see docs/masks.md; what one cannot express it refuses.
      rngs: where the initial weights come from.

    Raises:
      UserError: an odd number of rotary features; values wider than the keys with a back end that has one width for both;
        keys and values of another network.

    Source: "DeepSeek-V2", DeepSeek-AI, 2024; as in "DeepSeek-V3 Technical Report", DeepSeek-AI, 2024.
    Differs: the rotated pairs are the two halves, not neighbours.
    """

    needs_causal = False

    def __init__(
        self,
        width: int,
        *,
        heads: int = 8,
        query_rank: int | None = None,
        rank: int = 64,
        plain: int = 32,
        rotary: int = 16,
        value_width: int = 32,
        theta: float = 10_000.0,
        scaling: RopeScaling | None = None,
        backend: Backend = "xla",
        rngs: nnx.Rngs,
    ):
        if rotary < 2 or rotary % 2:
            raise UserError(f"LatentAttention.rotary = {rotary}: expected an even number, 2 or more")
        if backend in ONE_WIDTH and value_width > plain + rotary:
            raise UserError(
                f"LatentAttention.backend = {backend!r} with value_width = {value_width}: expected at most plain + rotary = "
                f"{plain + rotary}, or 'xla'"
            )
        self.rank, self.plain, self.rotary, self.value_width = rank, plain, rotary, value_width
        self.theta, self.scaling, self.backend = theta, nnx.static(scaling), backend
        self.query_latent = None if query_rank is None else param(normal(rngs, (width, query_rank)), ("embed", None))
        self.query_norm = None if query_rank is None else RMSNorm(query_rank)
        inner = ("embed", "heads", "kv")
        self.query = param(normal(rngs, (query_rank or width, heads, plain + rotary)), inner)
        self.latent = param(normal(rngs, (width, rank)), ("embed", None))
        self.latent_norm = RMSNorm(rank)
        self.rotary_key = param(normal(rngs, (width, rotary)), ("embed", None))
        self.key = param(normal(rngs, (rank, heads, plain)), inner)
        self.value = param(normal(rngs, (rank, heads, value_width)), inner)
        self.out = param(normal(rngs, (heads, value_width, width)), ("heads", "kv", "embed"))

    def __call__(
        self, hidden: Float[Array, "B S D"], context: Any
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Array]]:
        """Mixes tokens; returns the result, the new cache entry (None without a cache) and the weights, if asked for."""
        if context.source is not None:
            raise UserError("LatentAttention takes keys and values from its own states: use Attention to read others")
        at, visible, bias = context.at, context.visible, context.bias
        latents, cache = self._latents(hidden, context), None
        if context.cache is not None:
            old = context.cache["latent"]
            new = latents.astype(old.dtype)
            cache = {"latent": jax.lax.dynamic_update_slice_in_dim(old, new, context.cache_length, axis=1)}
            latents = cache["latent"].astype(hidden.dtype)
        places = context.positions
        if at is not None:
            hidden, visible, places = gather(hidden, at), gather(visible, at), gather(places, at)
            bias = bias if bias is None else jnp.take_along_axis(bias, at[:, None, :, None], axis=2)
        keys: Keys = "row" if cache is None else "cache"
        view = View(visible, context.mask, context.segments, context.positions, at, keys)
        k, v = self._expanded(latents)
        with few(at):
            q = self._queries(hidden, places)
            mixed = self._product(q, k, v, view, bias, causal=context.causal)
            taps = {"attention": reference_weights(q, k, visible, bias)} if "attention" in context.taps else {}
            out = self.out.get_value().astype(hidden.dtype)
            result = linear(mixed.reshape(*mixed.shape[:2], -1), out.reshape(-1, out.shape[-1]))
        return result, cache, taps

    def _latents(self, hidden: Array, context: Any) -> Float[Array, "B S C"]:
        """What a cache keeps: c, and the rotated key behind it."""
        kernels = [p.get_value().astype(hidden.dtype) for p in (self.latent, self.rotary_key)]
        latent, key = side_by_side(hidden, kernels)
        key = rotate(key[:, :, None], context.positions, self.theta, self.scaling)[:, :, 0]
        return jnp.concatenate([self.latent_norm(latent), key], axis=-1)

    def _expanded(self, latents: Array) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H V"]]:
        """Keys and values of every head."""
        latent, key = latents[..., : self.rank], latents[..., self.rank :]
        plain, v = side_by_side(latent, [p.get_value().astype(latent.dtype) for p in (self.key, self.value)])
        shared = jnp.broadcast_to(key[:, :, None], (*plain.shape[:3], self.rotary))
        k = jnp.concatenate([plain, shared], axis=-1)
        # Where rows are cut along their length, queries stay where they are and see the keys of the whole row.
        return constrain(k, "batch", None, "heads", "kv"), constrain(v, "batch", None, "heads", "kv")

    def _queries(self, hidden: Array, places: Array) -> Float[Array, "B Q H K"]:
        if self.query_latent is not None and self.query_norm is not None:
            hidden = self.query_norm(linear(hidden, self.query_latent.get_value().astype(hidden.dtype)))
        q = linear(hidden, self.query.get_value().astype(hidden.dtype))
        turned = rotate(q[..., self.plain :], places, self.theta, self.scaling)
        # The rotated parts of both sides are sharpened already; here the rest, for both sides.
        q = jnp.concatenate([self._sharper() ** 2 * q[..., : self.plain], turned], axis=-1)
        return constrain(q, "batch", "length", "heads", "kv")

    def _sharper(self) -> float:
        """What the scaling of positions multiplies queries and keys by."""
        if self.scaling is None:
            return 1.0
        half = self.rotary // 2
        return self.scaling(self.theta ** (-jnp.arange(half) / half), self.theta)[1]

    def _product(
        self, q: Array, k: Array, v: Array, view: View, bias: Array | None, *, causal: bool
    ) -> Float[Array, "B Q H V"]:
        if self.backend in ONE_WIDTH:
            v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - self.value_width)])
        product = attention_causal if causal else attention_full
        mixed = product(q, k, v, view, bias, backend=self.backend)[..., : self.value_width]
        return constrain(mixed, "batch", "length", "heads", "kv")

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Array]:
        """Room for the latents of `capacity` tokens."""
        return {"latent": jnp.zeros((rows, capacity, self.rank + self.rotary), dtype)}
