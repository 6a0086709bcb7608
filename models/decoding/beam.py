"""Beam search: the likeliest sequences, several at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.decoding.decoder import Decoder, Prompts
from models.decoding.loop import Continuations, Stop, Strategy
from partitioning.ranges import Range, check_fields


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Sequences, W a row.

    Args:
      score: of each; minus infinity where there is none.
      tokens, log_probability: token by token.
      size: how many tokens.
    """

    score: Float[Array, "B W"]
    tokens: Int[Array, "B W T"]
    log_probability: Float[Array, "B W T"]
    size: Int[Array, "B W"]

    @classmethod
    def none(cls, rows: int, beams: int, stop: Stop, dtype: Any) -> Hypotheses:
        """Room for W sequences a row."""
        shape = (rows, beams)
        long = (*shape, stop.length)
        return cls(
            jnp.full(shape, -jnp.inf, dtype),
            jnp.full(long, stop.pad, jnp.int32),
            jnp.zeros(long, dtype),
            jnp.zeros(shape, jnp.int32),
        )

    def take(self, index: Int[Array, "B N"]) -> Hypotheses:
        """Some of each row's."""
        return jax.tree.map(lambda x: jax.vmap(lambda own, i: own[i])(x, index), self)

    def best(self, other: Hypotheses, count: int) -> Hypotheses:
        """The best of both, `count` a row."""
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), self, other)
        return both.take(jax.lax.top_k(both.score, count)[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Search:
    """The state: sequences that go on (scored by their log-probability), the best that ended, and the cache of `parent`s."""

    going: Hypotheses
    ended: Hypotheses
    parent: Int[Array, "B W"]
    alive: Bool[Array, B]
    count: Int[Array, ""]
    cache: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Beam(Strategy):
    """Keeps the W likeliest sequences at each length, and the W best that ended.

    score(y) = log p(y) / |y|^penalty, |y| the tokens of y with its end token. Of the continuations of all W sequences
    the best W that do not end go on; one that ends is kept if it is among the best W of all. A row is done when no
    sequence that goes on could still beat the worst of W that ended. With beams = 1 and penalty = 0 this is greedy.

    Args:
      beams: W.
      penalty: 0 for the likeliest sequence, 1 for the likeliest by token; more favours longer ones.

    Source: "Sequence to Sequence Learning with Neural Networks", Sutskever et al., 2014; length normalisation: "Google's
      Neural Machine Translation System", Wu et al., 2016.
    Differs: the length itself stands where Wu et al. have (5 + |y|) / 6, as in `transformers`, which agrees token for
      token with early_stopping='never'.
    """

    beams: Annotated[int, Range(1, 1 << 20)] = 4
    penalty: Annotated[float, Range(-100, 100)] = 1.0

    def __post_init__(self):
        check_fields(self)

    def start(self, model: Decoder, prompts: Prompts, stop: Stop, keys: jax.Array) -> Search:
        """See `Strategy.start`."""
        hidden, cache = model.prefill(prompts, stop.length)
        logits = model.scores(hidden)
        rows = len(logits)
        none = Hypotheses.none(rows, self.beams, stop, logits.dtype)
        # One empty sequence a row; the other places stand for none.
        going = Hypotheses(none.score.at[:, 0].set(0), none.tokens, none.log_probability, none.size)
        cache = model.rows(cache, jnp.repeat(jnp.arange(rows), self.beams))
        every = jnp.repeat(logits, self.beams, axis=0)
        return self._choose(every, going, none, jnp.zeros((), jnp.int32), cache, stop)

    def advance(self, model: Decoder, stop: Stop, state: Search) -> Search:
        """See `Strategy.advance`."""
        rows = len(state.parent)
        index = (state.parent + self.beams * jnp.arange(rows)[:, None]).reshape(-1)
        last = jnp.take(state.going.tokens, state.count - 1, axis=2).reshape(-1)
        hidden, cache = model.step(last, model.rows(state.cache, index))
        return self._choose(model.scores(hidden), state.going, state.ended, state.count, cache, stop)

    def result(self, stop: Stop, state: Search) -> Continuations:
        """See `Strategy.result`: each row's best sequence, those that were cut at the longest among them."""
        length = jnp.asarray(stop.length, state.going.score.dtype)
        cut = state.going.score / length**self.penalty
        cut = jnp.where(state.count == stop.length, cut, -jnp.inf)
        whole = Hypotheses(cut, state.going.tokens, state.going.log_probability, state.going.size)
        best = state.ended.best(whole, 1)
        drawn = jnp.arange(stop.length) < best.size
        tokens = jnp.where(drawn, best.tokens[:, 0], stop.pad)
        return Continuations(tokens, drawn, jnp.where(drawn, best.log_probability[:, 0], 0))

    def _choose(
        self, logits: Float[Array, "N V"], going: Hypotheses, ended: Hypotheses, count: Any, cache: Any, stop: Stop
    ) -> Search:
        """The next token of every sequence, from its logits; row b's W sequences stand together."""
        rows, size = len(going.score), logits.shape[-1]
        each = jax.nn.log_softmax(logits).reshape(rows, self.beams, size)
        total = (going.score[..., None] + each).reshape(rows, -1)
        # Enough that W of them go on, even if every end token of every sequence is better.
        wanted = min((1 + len(stop.ends)) * self.beams, self.beams * size)
        score, index = jax.lax.top_k(total, wanted)
        parent, token = index // size, (index % size).astype(jnp.int32)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[..., None].astype(old.dtype), count, axis=2)
        longer = going.take(parent)
        chosen = jnp.take_along_axis(each.reshape(rows, -1), index, axis=1)
        longer = Hypotheses(score, put(longer.tokens, token), put(longer.log_probability, chosen), longer.size + 1)
        ends = stop.ended(token)
        counts = ends & (jnp.arange(wanted) < self.beams)
        length = (count + 1).astype(score.dtype)
        scored = jnp.where(counts, score / length**self.penalty, -jnp.inf)
        ended = ended.best(Hypotheses(scored, longer.tokens, longer.log_probability, longer.size), self.beams)
        score, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), self.beams)
        going = longer.take(place)
        going = Hypotheses(score, going.tokens, going.log_probability, going.size)
        # log p only falls: over a positive power of the length it is best at the longest, else now.
        last = jnp.asarray(stop.length, score.dtype) if self.penalty > 0 else length + 1
        alive = score[:, 0] / last**self.penalty > ended.score.min(1)
        return Search(going, ended, jnp.take_along_axis(parent, place, axis=1), alive, count + 1, cache)
