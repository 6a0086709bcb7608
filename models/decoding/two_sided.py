"""Generation by an encoder-decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.decoding.decoder import Cache, Prompts, TrunkDecoder, cache_rows
from models.encoder_decoder import EncoderDecoder
from models.masks import Causal


@dataclass(frozen=True)
class TwoSidedDecoder:
    """An encoder that reads the prompts, and a decoder that writes from nothing but a first token.

    Args:
      model: the decoder's mixers have a cache.
    """

    model: EncoderDecoder

    def prefill(self, prompts: Prompts, room: int) -> tuple[Float[Array, "B D"], Cache]:
        """See `Decoder.prefill`: the state at the decoder's first token; of a prompt its last document is read."""
        segment = prompts.following[0]
        here = (prompts.segments == segment[:, None]).astype(jnp.int32)
        read = self.model.encoder(prompts.tokens, segments=prompts.segments, positions=prompts.positions)
        rows = len(prompts.tokens)
        trunk = self.model.decoder.empty_cache(rows, room + 1, memory=read.hidden, memory_segments=here)
        first = jnp.full((rows,), self.model.start, jnp.int32)
        return self.step(first, {"trunk": trunk, "position": jnp.zeros((rows,), jnp.int32)})

    def read(
        self, prompts: Prompts, room: int
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 1 D"], Bool[Array, "B 1"], Cache]:
        """See `Decoder.read`: what the decoder has written begins with its first token."""
        hidden, cache = self.prefill(prompts, room)
        return hidden, hidden[:, None], jnp.ones((len(hidden), 1), bool), cache

    def step(self, tokens: Int[Array, B], cache: Cache) -> tuple[Float[Array, "B D"], Cache]:
        """See `Decoder.step`."""
        position, decoder = cache["position"], self.model.decoder
        out = decoder(
            embeddings=decoder.embed(tokens[:, None], position[:, None], table=self.model.table.get_value()),
            segments=jnp.ones((len(tokens), 1), jnp.int32),
            positions=position[:, None],
            mask=Causal(),
            cache=cache["trunk"],
        )
        return out.hidden[:, 0], {"trunk": out.cache, "position": position + 1}

    def scores(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """See `Decoder.scores`."""
        return self.model.scores(hidden).logits()

    def rows(self, cache: Cache, index: Int[Array, N]) -> Cache:
        """See `Decoder.rows`."""
        return {"trunk": cache_rows(cache["trunk"], index), "position": cache["position"][index]}


def decoder_of(model: Any, *, prefix: bool = False) -> TrunkDecoder | TwoSidedDecoder:
    """A trained model as what generation asks for.

    Args:
      model: a trunk, or an encoder-decoder.
      prefix: whether a trunk reads prompts in both directions, see `TrunkDecoder`.
    """
    return TwoSidedDecoder(model) if model.two_sided else TrunkDecoder(model, prefix)
