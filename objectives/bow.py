"""Bag-of-words prediction from a document's first state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from models.masks import Bidirectional
from models.vocabulary import Vocabulary
from objectives.base import Loss, Term, metric
from objectives.embedding import routes
from objectives.masked_lm import Masking
from objectives.select import Selection
from partitioning.ranges import Range, check_fields


def begins(segments: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Which tokens are the first of a document."""
    return (segments > 0) & (positions == 0)


def starts(segments: Int[Array, "B S"], positions: Int[Array, "B S"], most: int) -> Selection:
    """The first tokens of a row's first `most` documents."""
    length = segments.shape[1]
    slots = jnp.where(begins(segments, positions), jnp.arange(length), length)
    slots = jnp.sort(slots, axis=1)[:, :most]
    used = slots < length
    return Selection(jnp.where(used, slots, 0), used.astype(jnp.float32))


def bags(
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    vocabulary: Vocabulary,
    most: int,
) -> Bool[Array, "B K V"]:
    """Which ordinary tokens occur in each of a row's first K = `most` documents."""
    which = jnp.cumsum(begins(segments, positions), axis=1) - 1
    # What does not count is written past the last document, where the write is dropped.
    which = jnp.where((segments > 0) & ~vocabulary.is_special(tokens), which, most)
    empty = jnp.zeros((most, vocabulary.size), bool)
    return jax.vmap(lambda document, token: empty.at[document, token].set(True, mode="drop"))(which, tokens)


@dataclass(frozen=True, kw_only=True)
class BagOfWords(Masking):
    """The encoder fills masks, and its state at a document's first token names the tokens that the document has.

    loss = L_mlm + mean_d -1/|W_d| sum_{v in W_d} log softmax(head(h_first(d)))_v,  W_d the distinct ordinary tokens of
    document d before the corruption.

    Args:
      most: documents of a row that are asked; those behind them only have masks. `asked` tells the share that is.
      select, replace, penalty: as in `Masking`, of the masks.

    Source: "Drop your Decoder: Pre-training with Bag-of-Word Prediction for Dense Passage Retrieval", Ma et al., 2024.
    Differs: a packed row has one bag a document.
    """

    most: Annotated[int, Range(1, 1 << 16)] = 8

    def __post_init__(self):
        check_fields(self)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
        trunk = models.trunk
        hidden, seen = self.hide(batch, trunk, step=step, key=key)
        most = min(self.most, tokens.shape[1])
        first = starts(segments, positions, most)
        out = trunk(
            seen,
            segments=segments,
            positions=positions,
            mask=Bidirectional(),
            keys=key("dropout"),
            at=jnp.concatenate([hidden.positions, first.positions], axis=1),
            **routes(batch),
        )
        masked, states = jnp.split(out.hidden, [hidden.positions.shape[1]], axis=1)
        mlm, accuracy = self.penalty(trunk.scores(masked), hidden.gather(tokens), hidden.weight)

        bag = bags(tokens, segments, positions, trunk.vocabulary, most)
        size = bag.sum(-1)
        weight = first.weight * (size > 0)
        logits = trunk.scores(states).logits()
        named = jnp.sum(logits, axis=-1, where=bag) / jnp.maximum(size, 1)
        each = (jax.nn.logsumexp(logits, axis=-1) - named) * weight
        right = jnp.take_along_axis(bag, logits.argmax(-1, keepdims=True), axis=-1)[..., 0] * weight
        bow = Term(each.sum(), weight.sum(), 1.0, (jax.lax.stop_gradient(each.sum(1)), weight.sum(1)))
        return Loss(
            {
                "mlm": mlm,
                "accuracy": accuracy,
                "bow": bow,
                "bow_accuracy": metric(right.sum(), weight.sum()),
                "asked": metric(first.weight.sum(), begins(segments, positions).sum()),
            }
        )
