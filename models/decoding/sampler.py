"""Strategies that choose each row's token by its logits alone: the best, or a draw."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.decoding.decoder import Decoder, Prompts
from models.decoding.filters import Filter
from models.decoding.loop import Continuations, Record, Stop, Strategy
from partitioning.ranges import Range, check_fields


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawing:
    """The state: what was chosen, the last token, which the cache does not hold yet, and one key a row."""

    record: Record
    token: Int[Array, B]
    cache: dict[str, Any]
    keys: jax.Array

    @property
    def count(self) -> Int[Array, ""]:
        """Tokens so far."""
        return self.record.count

    @property
    def alive(self) -> Float[Array, B]:
        """Rows that go on."""
        return self.record.alive


class TokenByToken(Strategy):
    """Base of the strategies that choose by logits alone."""

    def start(self, model: Decoder, prompts: Prompts, stop: Stop, keys: jax.Array) -> Drawing:
        """See `Strategy.start`: the first token is chosen from the prompt's last state."""
        hidden, cache = model.prefill(prompts, stop.length)
        logits = model.scores(hidden)
        return self._add(logits, cache, Record.empty(len(logits), stop, logits.dtype), stop, keys)

    def advance(self, model: Decoder, stop: Stop, state: Drawing) -> Drawing:
        """See `Strategy.advance`."""
        hidden, cache = model.step(state.token, state.cache)
        return self._add(model.scores(hidden), cache, state.record, stop, state.keys)

    def result(self, stop: Stop, state: Drawing) -> Continuations:
        """See `Strategy.result`."""
        return state.record.written

    def _add(self, logits: Float[Array, "B V"], cache: Any, record: Record, stop: Stop, keys: jax.Array) -> Drawing:
        token, log_probability = self.choose(logits, keys, record.count)
        return Drawing(record.add(token, log_probability, stop), token, cache, keys)

    @abstractmethod
    def choose(
        self, logits: Float[Array, "B V"], keys: jax.Array, count: Int[Array, ""]
    ) -> tuple[Int[Array, B], Float[Array, B]]:
        """A token a row and its log-probability."""


def _picked(logits: Float[Array, "B V"], token: Int[Array, B]) -> Float[Array, B]:
    return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)


def first_best(logits: Float[Array, "B V"], block: int = 256) -> Int[Array, B]:
    """argmax over the vocabulary: the first block that has the maximum, and the first in it that is as large.

    XLA for CPU computes its own argmax, a reduction of pairs, ten times slower.
    """
    size = logits.shape[-1]
    filled = jnp.pad(logits, ((0, 0), (0, -size % block)), constant_values=-jnp.inf)
    blocks = filled.reshape(len(logits), -1, block)
    at = _first(blocks.max(-1))
    inside = _first(jnp.take_along_axis(blocks, at[:, None, None], axis=1)[:, 0])
    return jnp.minimum(block * at + inside, size - 1)


def _first(x: Float[Array, "B N"]) -> Int[Array, B]:
    # Not a number equals nothing: then it is the last one, and not one that is none.
    last = x.shape[-1] - 1
    return jnp.where(x == x.max(-1, keepdims=True), jnp.arange(last + 1, dtype=jnp.int32), last).min(-1)


@dataclass(frozen=True, kw_only=True)
class Greedy(TokenByToken):
    """The likeliest token, the first where several are."""

    def choose(
        self, logits: Float[Array, "B V"], keys: jax.Array, count: Int[Array, ""]
    ) -> tuple[Int[Array, B], Float[Array, B]]:
        """See `TokenByToken.choose`."""
        token = first_best(logits)
        return token, _picked(logits, token)


@dataclass(frozen=True, kw_only=True)
class Sampler(TokenByToken):
    """A token drawn from softmax(filters(logits / temperature)), by a Gumbel noise that belongs to the row and the place.

    Args:
      temperature: above 0.
      filters: applied one after the other, such as `TopK`, `TopP`, `MinP`.
    """

    temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0
    filters: tuple[Filter, ...] = ()

    def __post_init__(self):
        check_fields(self)

    def choose(
        self, logits: Float[Array, "B V"], keys: jax.Array, count: Int[Array, ""]
    ) -> tuple[Int[Array, B], Float[Array, B]]:
        """See `TokenByToken.choose`; the log-probability is that under what was drawn from."""
        logits = logits / self.temperature
        for keep in self.filters:
            logits = keep(logits)
        noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, count), logits.shape[1:]))(keys)
        token = first_best(logits + noise)
        return token, _picked(logits, token)
