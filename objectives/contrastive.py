"""Contrastive learning with the whole batch as negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.pooling import Pooling
from objectives.base import Loss, Objective, Term, metric
from objectives.embedding import embed, text_fields
from partitioning import UserError
from partitioning.ranges import Range, check_fields


def info_nce(query: Float[Array, "B D"], positive: Float[Array, "B D"], temperature: float) -> Float[Array, B]:
    """-log softmax_j(q_i p_j / temperature) at j = i, for each row; the other rows' positives are the negatives."""
    scores = query @ positive.T / temperature
    return jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)


@dataclass(frozen=True, kw_only=True)
class InfoNCE(Objective):
    """Pull a query to its positive and away from every other row's, over the global batch whatever the sharding.

    loss = mean_i -log( exp(q_i p_i / temperature) / sum_j exp(q_i p_j / temperature) ),  q, p unit vectors.

    Args:
      temperature: of the softmax.
      pooling: mean, first or last.
      chunked: rows embedded at once. With it the global batch is embedded in `prepare` without a gradient, chunk by
        chunk, the loss's derivative is taken at each vector, and the step differentiates sum(vector * derivative):
        memory is a chunk's, and accumulation is exact. None embeds all rows at once and refuses accumulation.

    Raises:
      UserError: `chunked` does not divide the batch.

    Source: "Representation Learning with Contrastive Predictive Coding", van den Oord et al., 2018; chunks:
      "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", Gao et al., 2021.
    Differs: nothing known.
    """

    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.05
    pooling: Pooling = "mean"
    chunked: Annotated[int, Range(1, 1 << 30)] | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def couples_rows(self):
        """Only the form that embeds all rows at once does so in the call."""
        return self.chunked is None

    @property
    def runs_twice(self):
        """The form in chunks takes its gradient at vectors that `prepare` has."""
        return self.chunked is not None

    def fields(self):
        """Pairs of texts."""
        return text_fields("query", "positive")

    def check(self, *, steps, batch):
        """See `Objective.check`."""
        super().check(steps=steps, batch=batch)
        rows = batch["query/tokens"][0][0]
        if self.chunked and rows % self.chunked:
            raise UserError(f"InfoNCE.chunked = {self.chunked} does not divide the batch of {rows} rows")

    def _vectors(self, models, batch, key):
        return tuple(embed(models.trunk, batch, name, key, self.pooling) for name in ("query", "positive"))

    def prepare(self, models, batch, *, step, key):
        """Embeds the batch in chunks and takes the loss's derivative at each vector."""
        if self.chunked is None:
            return batch
        rows = batch["row"].shape[0]
        # Every (rows / chunked)-th row to a chunk, so that a chunk lives on all devices.
        split = lambda x: x.reshape(self.chunked, rows // self.chunked, *x.shape[1:]).swapaxes(0, 1)
        whole = lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:])
        parts = {name: split(batch[name]) for name in (*self.fields(), "row", "source") if name in batch}
        vectors = jax.lax.map(lambda part: self._vectors(models, part, key.chunk(part["row"])), parts)
        query, positive = (jax.lax.stop_gradient(whole(x)) for x in vectors)
        loss, back = jax.vjp(lambda q, p: info_nce(q, p, self.temperature), query, positive)
        toward_query, toward_positive = back(jnp.ones_like(loss))
        new = {"infonce/loss": loss, "infonce/query": toward_query, "infonce/positive": toward_positive}
        return batch | new | {"infonce/hit": _hits(query, positive)}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        query, positive = self._vectors(models, batch, key)
        rows = jnp.asarray(query.shape[0], jnp.float32)
        if self.chunked is None:
            each = info_nce(query, positive, self.temperature)
            hits = _hits(query, positive)
            total = each.sum()
        else:
            each, hits = batch["infonce/loss"], batch["infonce/hit"]
            linear = (query * batch["infonce/query"] + positive * batch["infonce/positive"]).sum()
            # The value is the loss's, the gradient the linear form's.
            total = each.sum() + linear - jax.lax.stop_gradient(linear)
        ones = jnp.ones_like(each)
        return Loss({"infonce": Term(total, rows, 1.0, (each, ones)), "accuracy": metric(hits.sum(), rows)})


def _hits(query, positive):
    scores = query @ positive.T
    return (jnp.argmax(scores, axis=1) == jnp.arange(query.shape[0])).astype(jnp.float32)
