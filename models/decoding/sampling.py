"""Prompts with sampled continuations behind them, as training takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.decoding.decoder import Prompts, TrunkDecoder
from models.decoding.loop import Stop, generate
from models.decoding.sampler import Greedy, Sampler


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Samples:
    """Prompts with sampled continuations behind them.

    Args:
      tokens, segments, positions: `[B, P + T]`; the prompt keeps its padding, the continuation starts at slot P.
      drawn: 1 at sampled tokens, the end token among them, 0 after it, `[B, P + T]`.
      log_probability: of each sampled token under the distribution it was drawn from, 0 elsewhere, `[B, P + T]`.
    """

    tokens: Int[Array, "B L"]
    segments: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    drawn: Float[Array, "B L"]
    log_probability: Float[Array, "B L"]


def sample(
    trunk: Any,
    tokens: Int[Array, "B P"],
    segments: Int[Array, "B P"],
    *,
    length: int,
    keys: jax.Array,
    temperature: float = 1.0,
) -> Samples:
    """Draws x_t ~ softmax(s_t / temperature) until the end token or `length` tokens; a temperature of 0 takes the best.

    Args:
      trunk: with a head; every mixer has a cache.
      tokens, segments: prompts, one a row from slot 0 on, segment 0 behind them.
      length: T, most tokens to draw.
      keys: one key a row.
      temperature: at least 0.
    """
    prompts, vocabulary = Prompts(tokens, segments), trunk.vocabulary
    strategy = Sampler(temperature=temperature) if temperature else Greedy()
    stop = Stop(length=length, ends=(vocabulary.eos,), pad=vocabulary.pad)
    found = generate(TrunkDecoder(trunk), prompts, strategy, stop, keys)
    segment, position = prompts.following
    join = lambda first, then: jnp.concatenate([first, then.astype(first.dtype)], axis=1)
    nothing = jnp.zeros(tokens.shape, found.log_probability.dtype)
    return Samples(
        join(tokens, found.tokens),
        join(segments, jnp.where(found.drawn, segment[:, None], 0)),
        join(prompts.positions, jnp.where(found.drawn, position[:, None] + jnp.arange(length), 0)),
        join(nothing, found.drawn),
        join(nothing, found.log_probability),
    )
