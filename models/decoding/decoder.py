"""What generation asks of a model, and a trunk that answers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.masks import Causal, Prefix
from models.positions import gather

Cache = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Texts to go on with, one a row from slot 0 on, padded on the right.

    Args:
      tokens: ids.
      segments: the document of each token, 0 for padding; the last document of a row is the one that goes on.
    """

    tokens: Int[Array, "B P"]
    segments: Int[Array, "B P"]

    @property
    def here(self) -> Bool[Array, "B P"]:
        """Where a token is."""
        return self.segments > 0

    @property
    def last(self) -> Int[Array, "B 1"]:
        """The slot of each row's last token; 0 where there is none."""
        return jnp.where(self.here, jnp.arange(self.tokens.shape[1]), 0).max(1, keepdims=True)

    @property
    def positions(self) -> Int[Array, "B P"]:
        """Places within the documents."""
        index = jnp.arange(self.tokens.shape[1], dtype=self.segments.dtype)
        before = jnp.pad(self.segments[:, :-1], ((0, 0), (1, 0)))
        start = jax.lax.cummax(jnp.where(self.segments != before, index, 0), axis=1)
        return jnp.where(self.here, index - start, 0)

    @property
    def following(self) -> tuple[Int[Array, B], Int[Array, B]]:
        """Segment and position of the token behind each prompt; a row without a prompt begins its first document."""
        segment, position = (gather(x, self.last)[:, 0] for x in (self.segments, self.positions))
        return jnp.maximum(segment, 1), jnp.where(segment > 0, position + 1, 0)


class Decoder(Protocol):
    """A model that reads prompts into a cache and goes on one token at a time."""

    def prefill(self, prompts: Prompts, room: int) -> tuple[Float[Array, "B D"], Cache]:
        """The state at each prompt's last token, and a cache with room for `room` more tokens."""

    def read(
        self, prompts: Prompts, room: int
    ) -> tuple[Float[Array, "B D"], Float[Array, "B C D"], Bool[Array, "B C"], Cache]:
        """As `prefill`, with the states at every slot of the text that goes on between the two, and where there is one."""

    def step(self, tokens: Int[Array, B], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """The states at one more token a row, and the cache with it."""

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits of the token behind each state."""

    def rows(self, cache: Cache, index: Int[Array, N]) -> Cache:
        """The cache of some rows, in any order, any of them several times."""


@dataclass(frozen=True)
class TrunkDecoder:
    """A trunk read from left to right.

    All rows write to the same slot of the cache, behind the longest prompt; the padding before it has segment 0, which
    nothing sees.

    Args:
      trunk: with a head; every mixer has a cache.
      prefix: whether the tokens of a prompt's last document all see each other, as in training by a prefix objective.
    """

    trunk: Any
    prefix: bool = False

    def prefill(self, prompts: Prompts, room: int) -> tuple[Float[Array, "B D"], Cache]:
        """See `Decoder.prefill`; the last layer computes one slot a row."""
        hidden, cache = self._read(prompts, room, prompts.last)
        return hidden[:, 0], cache

    def read(
        self, prompts: Prompts, room: int
    ) -> tuple[Float[Array, "B D"], Float[Array, "B P D"], Bool[Array, "B P"], Cache]:
        """See `Decoder.read`."""
        states, cache = self._read(prompts, room, None)
        own = prompts.here & (prompts.segments == gather(prompts.segments, prompts.last))
        return gather(states, prompts.last)[:, 0], states, own, cache

    def _read(self, prompts: Prompts, room: int, at: Any) -> tuple[Float[Array, "B K D"], Cache]:
        rows, length = prompts.tokens.shape
        segment, position = prompts.following
        inside = jnp.pad(prompts.segments == segment[:, None], ((0, 0), (0, room)))
        out = self.trunk(
            prompts.tokens,
            segments=prompts.segments,
            positions=prompts.positions,
            mask=Prefix(inside) if self.prefix else Causal(),
            cache=self.trunk.empty_cache(rows, length + room),
            at=at,
        )
        return out.hidden, {"trunk": out.cache, "segment": segment, "position": position}

    def step(self, tokens: Int[Array, B], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """See `Decoder.step`."""
        segment, position = cache["segment"], cache["position"]
        out = self.trunk(
            tokens[:, None],
            segments=segment[:, None],
            positions=position[:, None],
            mask=Causal(),
            cache=cache["trunk"],
        )
        return out.hidden[:, 0], {"trunk": out.cache, "segment": segment, "position": position + 1}

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """See `Decoder.scores`."""
        return self.trunk.scores(hidden).logits()

    def rows(self, cache: Cache, index: Int[Array, N]) -> Cache:
        """See `Decoder.rows`."""
        moved = {name: cache[name][index] for name in ("segment", "position")}
        return {"trunk": cache_rows(cache["trunk"], index), **moved}


def cache_rows(cache: Cache, index: Int[Array, N]) -> Cache:
    """Some rows of a trunk's cache, and of what it remembers of a memory."""
    take = lambda axis: lambda x: jnp.take(x, index, axis=axis)
    # Entries of scanned blocks have their layers in front.
    each = lambda entries: {
        name: jax.tree.map(take(1 if name.startswith("scanned/") else 0), entry) for name, entry in entries.items()
    }
    moved: Cache = {name: take(0)(cache[name]) for name in ("document", "segments", "positions")}
    if "memory" in cache:
        known = cache["memory"]
        moved["memory"] = {"entries": each(known["entries"]), "segments": take(0)(known["segments"])}
    return {"length": cache["length"], "entries": each(cache["entries"]), **moved}
