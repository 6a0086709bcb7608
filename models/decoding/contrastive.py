"""Contrastive search: likely tokens whose states are unlike those before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.decoding.decoder import Decoder, Prompts
from models.decoding.loop import Continuations, Record, Stop, Strategy
from models.positions import gather
from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Contrast:
    """The state.

    Args:
      record: what was chosen.
      hidden: the last token's state.
      before: directions of all states so far, where `seen` is true.
      cache: of k rows for each row, all alike; the last token is in it.
    """

    record: Record
    hidden: Float[Array, "B D"]
    before: Float[Array, "B C D"]
    seen: Bool[Array, "B C"]
    cache: dict[str, Any]

    @property
    def count(self) -> Int[Array, ""]:
        """Tokens so far."""
        return self.record.count

    @property
    def alive(self) -> Bool[Array, B]:
        """Rows that go on."""
        return self.record.alive


def _direction(states: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    wide = states.astype(jnp.promote_types(states.dtype, jnp.float32))
    return wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Contrastive(Strategy):
    """x_t = argmax over the k likeliest tokens v of (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

    h_v is the state that the model would have at v, h_j those at all tokens before it. With alpha = 0 this is greedy.

    Args:
      alpha: weight of the penalty.
      candidates: k.

    Raises:
      UserError: more candidates than the vocabulary has tokens.

    Source: "A Contrastive Framework for Neural Text Generation", Su et al., 2022.
    Differs: a prompt's h_j are of its last document only.
    """

    alpha: Annotated[float, Range(0, 1)] = 0.6
    candidates: Annotated[int, Range(1, 1 << 20)] = 4

    def __post_init__(self):
        check_fields(self)

    def start(self, model: Decoder, prompts: Prompts, stop: Stop, keys: jax.Array) -> Contrast:
        """See `Strategy.start`: nothing is chosen yet."""
        last, states, seen, cache = model.read(prompts, stop.length)
        rows = len(last)
        size = jax.eval_shape(model.scores, last).shape[-1]
        if self.candidates > size:
            raise UserError(f"Contrastive.candidates = {self.candidates}: the vocabulary has {size} tokens")
        behind = lambda x: jnp.pad(x, ((0, 0), (0, stop.length), *((0, 0),) * (x.ndim - 2)))
        before = _direction(states)
        return Contrast(
            Record.empty(rows, stop, before.dtype),
            last,
            behind(before),
            behind(seen),
            model.rows(cache, jnp.repeat(jnp.arange(rows), self.candidates)),
        )

    def advance(self, model: Decoder, stop: Stop, state: Contrast) -> Contrast:
        """See `Strategy.advance`: one step over the k candidates of every row."""
        rows, k = len(state.hidden), self.candidates
        logits = model.scores(state.hidden)
        chance, token = jax.lax.top_k(jax.nn.softmax(logits), k)
        hidden, cache = model.step(token.reshape(-1).astype(jnp.int32), state.cache)
        hidden = hidden.reshape(rows, k, -1)
        new = _direction(hidden)
        alike = jnp.where(state.seen[:, None], jnp.einsum("bkd,bcd->bkc", new, state.before), -1.0).max(-1)
        best = jnp.argmax((1 - self.alpha) * chance - self.alpha * alike, axis=1)[:, None]
        pick = lambda x: gather(x, best)[:, 0]
        record = state.record.add(pick(token).astype(jnp.int32), jnp.log(pick(chance)), stop)
        slot = state.before.shape[1] - stop.length + state.count
        put = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis=1)
        # The chosen candidate's row of the cache stands for all k of the next step.
        index = jnp.repeat(k * jnp.arange(rows) + best[:, 0], k)
        return Contrast(
            record,
            pick(hidden),
            put(state.before, gather(new, best)),
            put(state.seen, jnp.ones((rows, 1), bool)),
            model.rows(cache, index),
        )

    def result(self, stop: Stop, state: Contrast) -> Continuations:
        """See `Strategy.result`."""
        return state.record.written
