"""Attention of one text to another."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.attention import Attention, kept, taken
from models.backends.view import View
from models.masks import Bidirectional


class CrossAttention(Attention):
    """Multi-head softmax attention whose keys and values come from a memory, the states of another trunk.

    The arguments are those of `Attention`; theta is None, since places in two texts have no distance.

    Source: "Attention Is All You Need", Vaswani et al., 2017.
    Differs: nothing known.
    """

    def __init__(self, width: int, **options: Any):
        super().__init__(width, theta=None, **options)

    def remember(self, memory: Float[Array, "B M D"]) -> dict[str, Array]:
        """The keys and values of a memory as a cache has them, which decoding computes once."""
        key, value = self._part(memory, "key"), self._part(memory, "value")
        key = self._normed(key, self.key_norm)
        return {"key": kept(key, "key"), "value": kept(value, "value")}

    def read(
        self,
        hidden: Float[Array, "B Q D"],
        remembered: dict[str, Array],
        visible: Bool[Array, "B Q M"],
        taps: Sequence[str] = (),
    ) -> tuple[Float[Array, "B Q D"], dict[str, Array]]:
        """What the queries find, and the weights, if asked for."""
        query = self._normed(self._part(hidden, "query"), self.query_norm)
        key, value = (taken(remembered[name], name) for name in ("key", "value"))
        here = jnp.zeros(hidden.shape[:2], jnp.int32)
        view = View(visible, Bidirectional(), here, here, keys="memory")
        return self._mixed(hidden, query, key, value, view, None, causal=False, taps=taps)
