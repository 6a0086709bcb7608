"""The loop: a strategy chooses token after token until every row has ended, in one program of fixed shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.decoding.decoder import Decoder, Prompts
from models.few_rows import kernels, token_loop
from partitioning import whole


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When a row ends.

    A stop string is no matter of the loop, since a tokenizer can spell one string in many ways: who asks for one cuts the
    decoded text.

    Args:
      length: T, most tokens to choose.
      ends: tokens behind which a row ends; they belong to it.
      pad: what stands behind the end.
    """

    length: int
    ends: tuple[int, ...] = ()
    pad: int = 0

    def ended(self, tokens: Int[Array, "*B"]) -> Bool[Array, "*B"]:
        """Which tokens end a row."""
        return jnp.isin(tokens, jnp.asarray(self.ends, tokens.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Continuations:
    """What was chosen.

    Args:
      tokens: padding behind the end.
      drawn: where a token was chosen, an end token among them.
      log_probability: of each chosen token, 0 elsewhere.
    """

    tokens: Int[Array, "B T"]
    drawn: Bool[Array, "B T"]
    log_probability: Float[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Record:
    """Continuations in the making.

    Args:
      written: so far; `count` tokens a row.
      alive: rows that have not ended.
    """

    written: Continuations
    alive: Bool[Array, B]
    count: Int[Array, ""]

    @classmethod
    def empty(cls, rows: int, stop: Stop, dtype: Any) -> Record:
        """Room for `stop.length` tokens."""
        shape = (rows, stop.length)
        written = Continuations(
            jnp.full(shape, stop.pad, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.dtype(dtype))
        )
        return cls(written, jnp.ones((rows,), bool), jnp.zeros((), jnp.int32))

    def add(self, token: Int[Array, B], log_probability: Float[Array, B], stop: Stop) -> Record:
        """With one more token a row; padding in rows that have ended."""
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=self.count, axis=1)
        written = Continuations(
            put(self.written.tokens, jnp.where(self.alive, token, stop.pad)[:, None]),
            put(self.written.drawn, self.alive[:, None]),
            put(self.written.log_probability, jnp.where(self.alive, log_probability, 0)[:, None]),
        )
        return Record(written, self.alive & ~stop.ended(token), self.count + 1)


class Strategy(ABC):
    """How tokens are chosen. Its state is a dataclass of arrays with `count`, tokens so far, and `alive`, rows that go on."""

    @abstractmethod
    def start(self, model: Decoder, prompts: Prompts, stop: Stop, keys: jax.Array) -> Any:
        """Reads the prompts; `keys` has one key a row."""

    @abstractmethod
    def advance(self, model: Decoder, stop: Stop, state: Any) -> Any:
        """One more token a row: one step of the model."""

    @abstractmethod
    def result(self, stop: Stop, state: Any) -> Continuations:
        """What the last state says."""


def finish(model: Decoder, strategy: Strategy, stop: Stop, state: Any) -> Continuations:
    """Goes on from `Strategy.start` until no row is alive or all have `stop.length` tokens."""
    going = lambda state: (state.count < stop.length) & state.alive.any()
    with token_loop():
        # Axes of one, as of a single row, do not go around: XLA for CPU would copy the whole cache in every step for them. It
        # does so without them where kernels read the cache.
        shapes = jax.tree.map(jnp.shape, state)
        narrow = (lambda state: state) if kernels() else partial(jax.tree.map, jnp.squeeze)
        wide = lambda state: jax.tree.map(jnp.reshape, state, shapes)
        step = lambda state: narrow(strategy.advance(model, stop, wide(state)))
        last = jax.lax.while_loop(going, step, narrow(state))
    return strategy.result(stop, wide(last))


def generate(model: Decoder, prompts: Prompts, strategy: Strategy, stop: Stop, keys: jax.Array) -> Continuations:
    """Continuations of prompts.

    Args:
      model: a trunk or an encoder-decoder, by `decoder_of`.
      prompts: a row each; what is chosen for one does not depend on the others.
      strategy: how tokens are chosen.
      stop: when a row ends.
      keys: one key a row; strategies that draw nothing do not look at them.
    """
    # A token after another: there is no length to cut, in training rules neither.
    with whole("length"):
        return finish(model, strategy, stop, strategy.start(model, prompts, stop, keys))
