"""Listwise reranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from models.initializers import normal
from models.masks import Bidirectional
from models.pooling import Pooling, pool
from models.variables import param
from objectives.base import Companion, Loss, Objective, Term, metric
from objectives.embedding import text_fields
from partitioning.ranges import Range, check_fields


class Relevance(nnx.Module):
    """From a pooled text to one score."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.out = param(normal(rngs, (width,)), ("embed",))

    def __call__(self, pooled):
        """Scores of `[..., D]`."""
        return pooled @ self.out.get_value()


@dataclass(frozen=True, kw_only=True)
class ListNet(Objective):
    """A cross-encoder scores the candidates of a query; the scores' softmax is fitted to the relevances'.

    loss = mean over queries of -sum_j softmax(relevance / temperature)_j log softmax(score)_j, over valid candidates.
    A candidate's text holds the query.

    Args:
      temperature: of the relevances.
      pooling: mean, first or last.

    Source: "Learning to Rank: From Pairwise Approach to Listwise Approach", Cao et al., 2007.
    Differs: the top-one form; lists without a valid candidate count as nothing.
    """

    temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0
    pooling: Pooling = "first"

    def __post_init__(self):
        check_fields(self)

    def fields(self):
        """Lists of texts with relevances."""
        return (*text_fields("candidates"), "relevance", "valid")

    def companions(self, trunk, rngs):
        """The scoring head."""
        return {"relevance": Companion(Relevance(trunk.width, rngs))}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        rows, places = batch["relevance"].shape
        flat = {
            name: batch[f"candidates/{name}"].reshape(rows * places, -1) for name in ("tokens", "segments", "positions")
        }
        out = models.trunk(
            flat["tokens"],
            segments=flat["segments"],
            positions=flat["positions"],
            mask=Bidirectional(),
            keys=key.spread(places)("dropout"),
        )
        scores = models.relevance(pool(out.hidden, flat["segments"], self.pooling)).reshape(rows, places)
        valid = batch["valid"] > 0
        wanted = jnp.where(valid, batch["relevance"].astype(scores.dtype) / self.temperature, -1e30)
        share = jnp.where(valid, jax.nn.softmax(wanted), 0)
        each = -(share * jax.nn.log_softmax(jnp.where(valid, scores, -1e30))).sum(1)
        counted = valid.any(1).astype(scores.dtype)
        best = jnp.argmax(jnp.where(valid, scores, -1e30), axis=1) == jnp.argmax(wanted, axis=1)
        term = Term((each * counted).sum(), counted.sum(), 1.0, (each * counted, counted))
        return Loss({"listnet": term, "accuracy": metric((best * counted).sum(), counted.sum())})
