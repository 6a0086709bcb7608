"""LoLCATs: a trained softmax attention made linear, but for a window of near tokens."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.attention import Attention, attention_causal
from models.backends.view import View, over_heads
from models.initializers import normal
from models.linear_attention.apply import apply
from models.linear_attention.mixer import check_linear
from models.positions import borders, gather
from models.variables import param
from partitioning import UserError, constrain

PROJECTIONS = ("query", "key", "value", "out")


class LinearizedAttention(Attention):
    """Softmax over the last `window` tokens, linear attention to those before them, under one normaliser.

    y_i = (g sum_{i-w < j <= i} exp(s_ij - m_i) v_j + sum_{j <= i-w} f(q_i) . f'(k_j) v_j) / (the same sums without v),
    s_ij = q_i . k_j / sqrt(K), m_i the largest s_ij in the window, g = sigmoid of a number a head,
    f(x) = [softmax(x W), softmax(-x W)], with a W for each head of the queries and of the keys.

    Where a text is no longer than the window this is the softmax attention with the same weights. Called with the tap
    `transfer` it goes on with the softmax attention's result, and taps each token's mean squared difference between the two
    results, before the output projection: what the maps W and g learn from in the first of the method's two steps. In the
    second, projections have low-rank corrections (`rank`).

    Args:
      width: D.
      window: w, tokens that the softmax sees, the query's own included.
      features: F of W, half of a feature map's; K by default.
      rank: of what is added to the projections W_q, W_k, W_v, W_o, down times up times alpha / rank; 0 for nothing.
      alpha: see `rank`.
      rngs: where the initial weights come from.
      options: as in `Attention`.

    Raises:
      UserError: a window below 1; in a call, what a linear mixer refuses.

    Source: "LoLCATs: On Low-Rank Linearizing of Large Language Models", Zhang et al., 2024.
    Differs: keys that several heads of queries share have one map, not one for each; places where a document's tokens are
      not next to each other within a call are not provided for.
    """

    needs_causal = True

    def __init__(
        self,
        width: int,
        *,
        window: int = 64,
        features: int | None = None,
        rank: int = 0,
        alpha: float = 16.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(width, rngs=rngs, **options)
        if window < 1:
            raise UserError(f"LinearizedAttention.window = {window}: expected 1 token or more")
        size = self.head_width
        self.window, self.features = window, size if features is None else features
        self.rank, self.correction = rank, alpha / max(rank, 1)
        for name, heads in (("query", self.heads), ("key", self.kv_heads)):
            setattr(
                self,
                f"feature_{name}",
                param(normal(rngs, (heads, size, self.features), size**-0.5), ("heads", "kv", None)),
            )
        # sigmoid of it is 0.1.
        self.window_factor = param(jnp.full((self.heads,), -math.log(9.0)), ("heads",))
        for name in PROJECTIONS if rank else ():
            kernel, axes = getattr(self, name).get_value().shape, getattr(self, name).get_metadata()["axes"]
            split = 2 if name == "out" else 1
            down = normal(rngs, (*kernel[:split], rank), math.prod(kernel[:split]) ** -0.5)
            setattr(self, f"{name}_down", param(down, (*axes[:split], None)))
            setattr(self, f"{name}_up", param(jnp.zeros((rank, *kernel[split:])), (None, *axes[split:])))

    def __call__(
        self, hidden: Float[Array, "B S D"], context: Any
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Array]]:
        """Mixes tokens; returns the result, the new cache entry and the tap `transfer`, if asked for."""
        check_linear(type(self).__name__, context)
        q, k, v = self._turned(self._project(hidden, hidden, None), context.positions, context)
        q = q if self.query_scale is None else q * self.query_scale
        past = self._past(k, v, context)
        row = {
            "key": jnp.concatenate([past["key"], k], axis=1),
            "value": jnp.concatenate([past["value"], v], axis=1),
            "document": jnp.concatenate([past["document"], context.segments], axis=1),
        }
        near, weight = self._near(q, row)
        far, state = self._far(q, row, past["state"], context)
        total = weight + far[..., -1:]
        mixed = ((near + far[..., :-1]) / jnp.where(total > 0, total, 1)).astype(hidden.dtype)
        taps = {}
        if "transfer" in context.taps:
            view = View(context.visible, context.mask, context.segments, context.positions)
            softmax = attention_causal(q, k, v, view, None, backend=self.backend)
            taps["transfer"] = jnp.square((softmax - mixed).astype(near.dtype)).mean((-2, -1))
            mixed = softmax
        cache = None
        if context.cache is not None:
            last = jnp.argsort(row["document"] > 0, axis=1, stable=True)[:, -self.window :]
            kept = {name: gather(x, last).astype(context.cache[name].dtype) for name, x in row.items()}
            cache = kept | {"state": state}
        if context.at is not None:
            mixed, hidden = gather(mixed, context.at), gather(hidden, context.at)
        return self._joined(hidden, mixed), cache, taps

    def _near(
        self, q: Float[Array, "B S H K"], row: dict[str, Array]
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H 1"]]:
        """The window's part of both sums; a row has the last `window` tokens before the queries', and theirs."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        length, window = q.shape[1], self.window
        size = min(length, window)
        count = -(-length // size)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
        seen = lambda x: _windows(pad(x), count, size, window)
        blocks = lambda x: pad(x).reshape(x.shape[0], count, size, *x.shape[2:])
        k, v = (over_heads(row[name], self.heads) for name in ("key", "value"))
        # The query of slot t of a block stands at window + t of its keys.
        t, u = jnp.arange(size)[:, None], jnp.arange(window + size)[None]
        here, there = blocks(row["document"][:, window:]), seen(row["document"])
        visible = (u > t) & (u <= t + window) & (here[..., :, None] == there[..., None, :]) & (here > 0)[..., None]
        scores = jnp.einsum("bnthk,bnuhk->bnhtu", blocks(q * q.shape[-1] ** -0.5), seen(k), preferred_element_type=wide)
        scores = jnp.where(visible[:, :, None], scores, -1e30)
        powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        powers = jnp.where(visible[:, :, None], powers, 0)
        powers = powers * jax.nn.sigmoid(self.window_factor.get_value()).astype(wide)[:, None, None]
        near = jnp.einsum("bnhtu,bnuhk->bnthk", powers, seen(v).astype(wide))
        back = lambda x: x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :length]
        return back(near), back(powers.sum(-1).transpose(0, 1, 3, 2)[..., None])

    def _far(
        self, q: Float[Array, "B S H K"], row: dict[str, Array], state: Float[Array, "B H F V"], context: Any
    ) -> tuple[Float[Array, "B S H V"], Float[Array, "B H F V"]]:
        """Both sums over what left the window, side by side, and the state behind the last token."""
        length = q.shape[1]
        maps = lambda x, name: feature_map(x.astype(state.dtype), getattr(self, f"feature_{name}").get_value())
        left: dict[str, Any] = {name: x[:, :length] for name, x in row.items()}
        stays = (left["document"] == context.segments) & (context.segments > 0)
        keys = jnp.where(stays[..., None, None], maps(left["key"], "key"), 0)
        ones = jnp.ones_like(left["value"][..., :1])
        values = jnp.concatenate([left["value"], ones], axis=-1).astype(state.dtype)
        heads = (maps(q, "query"), over_heads(keys, self.heads), over_heads(values, self.heads))
        parts = [constrain(x, "batch", "length", "heads", "kv") for x in heads]
        still = jnp.zeros((1, 1, self.heads), state.dtype)
        begins = borders(context.segments, context.before)
        return apply("decayed", (*parts, still), begins, context.segments > 0, state)

    def _past(self, k: Array, v: Array, context: Any) -> dict[str, Array]:
        """What the cache has, or nothing."""
        if context.cache is not None:
            return context.cache | {name: context.cache[name].astype(k.dtype) for name in ("key", "value")}
        del v
        return self.empty_cache(len(k), 0, k.dtype)

    def _flat(self, name: str, dtype: Any) -> Float[Array, "I O"]:
        kernel = super()._flat(name, dtype)
        if not self.rank:
            return kernel
        down, up = (getattr(self, f"{name}_{part}").get_value().astype(dtype) for part in ("down", "up"))
        return kernel + self.correction * (down.reshape(-1, self.rank) @ up.reshape(self.rank, -1))

    def empty_cache(self, rows: int, capacity: int, dtype: Any) -> dict[str, Array]:
        """Room for the window and a state, whatever `capacity` is."""
        del capacity
        wide = jnp.promote_types(dtype, jnp.float32)
        shape = (rows, self.window, self.kv_heads, self.head_width)
        return {
            "key": jnp.zeros(shape, dtype),
            "value": jnp.zeros(shape, dtype),
            "document": jnp.zeros(shape[:2], jnp.int32),
            "state": jnp.zeros((rows, self.heads, 2 * self.features, self.head_width + 1), wide),
        }


def feature_map(x: Float[Array, "B S H K"], kernel: Float[Array, "H K F"]) -> Float[Array, "B S H 2F"]:
    """[softmax(x W), softmax(-x W)]."""
    scores = jnp.einsum("bshk,hkf->bshf", x, kernel.astype(x.dtype))
    return jnp.concatenate([jax.nn.softmax(scores), jax.nn.softmax(-scores)], axis=-1)


def _windows(x: Array, count: int, size: int, window: int) -> Array:
    """[B, window + count size, ...] -> [B, count, window + size, ...]: what the queries of each block may see."""
    if count == 1:
        return x[:, None]
    # Several blocks are each as long as the window.
    cut = x.reshape(x.shape[0], count + 1, size, *x.shape[2:])
    return jnp.concatenate([cut[:, :-1], cut[:, 1:]], axis=2)
