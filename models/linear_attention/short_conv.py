"""A short causal convolution over the tokens of a document, before linear attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.positions import borders, gather
from models.variables import param
from partitioning import UserError


class ShortConvolution(nnx.Module):
    """Each feature of a token becomes a weighted sum of what it is here and in the tokens just before.

    y_t = silu(sum_{l < W} w_{W-1-l} * x_{t-l}), over the tokens of t's document; padding is no token.

    Args:
      heads, features: H and K of what is convolved.
      size: W, tokens that a sum sees, its own included.
      rngs: where the initial weights come from.

    Raises:
      UserError: a size below 1.

    Source: "Hungry Hungry Hippos", Fu et al., 2022, as the short convolution before linear attention.
    Differs: nothing known.
    """

    def __init__(self, heads: int, features: int, *, size: int = 4, rngs: nnx.Rngs):
        if size < 1:
            raise UserError(f"a convolution over {size} tokens: expected 1 or more")
        self.size = size
        span = size**-0.5
        drawn = jax.random.uniform(rngs.params(), (size, heads, features), jnp.float32, -span, span)
        self.kernel = param(drawn, (None, "heads", "kv"))

    def __call__(
        self, x: Float[Array, "B S H K"], context: Any, cache: dict[str, Array] | None
    ) -> tuple[Float[Array, "B S H K"], dict[str, Array]]:
        """Convolves, and returns what the next call has to know.

        Args:
          x: features of every slot, padding included.
          context: of the block; its segments say where documents begin.
          cache: what an earlier call returned, or `empty_cache`; None where the text begins here.
        """
        here = context.segments > 0
        cache = self.empty_cache(len(x), x.shape[2], x.shape[3], x.dtype) if cache is None else cache
        age, count = ages(here, borders(context.segments, context.before), cache["count"])
        known = jnp.concatenate([cache["last"], x], axis=1)
        kernel = self.kernel.get_value().astype(x.dtype)
        present = jnp.pad(here, ((0, 0), (self.size - 1, 0)), constant_values=True)

        def total(known, kernel, before):
            parts = [known[:, self.size - 1 :] * kernel[-1]]
            for lag in range(1, self.size):
                seen = jnp.where((age >= lag)[..., None, None], before(known, lag), 0)
                parts.append(seen * kernel[self.size - 1 - lag])
            return sum(parts)

        near = lambda known, lag: known[:, self.size - 1 - lag : known.shape[1] - lag]
        if x.shape[1] == 1 or self.size == 1:
            mixed = total(known, kernel, near)
        else:
            # Where a document has padding inside, the tokens before a token are not in the slots before its slot.
            far = lambda known, lag: gather(known, tokens_before(present, lag)[:, self.size - 1 :])
            holes = (here[:, 1:] & ~here[:, :-1] & (age[:, 1:] > 0)).any()
            either = lambda known, kernel: jax.lax.cond(
                holes, partial(total, before=far), partial(total, before=near), known, kernel
            )
            mixed = jax.checkpoint(either)(known, kernel)
        ends = jnp.pad(present, ((0, 0), (0, 1)), constant_values=True)
        recent = [tokens_before(ends, lag)[:, -1] for lag in range(self.size - 1, 0, -1)]
        last = gather(known, jnp.stack(recent, axis=1)) if recent else known[:, :0]
        return jax.nn.silu(mixed), {"last": last, "count": count}

    def empty_cache(self, rows: int, heads: int, features: int, dtype: Any) -> dict[str, Array]:
        """No token so far: the last W - 1 that are none, and how many of the running document there were."""
        return {
            "last": jnp.zeros((rows, self.size - 1, heads, features), dtype),
            "count": jnp.zeros((rows,), jnp.int32),
        }


def ages(
    here: Bool[Array, "B S"], starts: Bool[Array, "B S"], count: Int[Array, B]
) -> tuple[Int[Array, "B S"], Int[Array, B]]:
    """How many tokens of its document stand before each token, and how many the last document has.

    Args:
      here: where a token is.
      starts: where a document begins.
      count: tokens of the document that goes on into the first slot.
    """
    number = jnp.cumsum(here, axis=1)
    first = jax.lax.cummax(jnp.where(starts, number, 1 - count[:, None]), axis=1)
    return number - first, (number - first)[:, -1] + 1


def tokens_before(here: Bool[Array, "B S"], lag: int) -> Int[Array, "B S"]:
    """The slot of the token that is `lag` tokens before the token in each slot; of the first where there are fewer."""
    order = jnp.argsort(~here, axis=1, stable=True)
    return jnp.take_along_axis(order, jnp.maximum(jnp.cumsum(here, axis=1) - 1 - lag, 0), axis=1)
