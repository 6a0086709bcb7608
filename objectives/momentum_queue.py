"""Contrastive learning against a queue of vectors from a slowly moving teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from models.pooling import Pooling, unit
from models.variables import Buffer, as_buffers, buffer
from objectives.base import Companion, Loss, Objective, Term, metric
from objectives.embedding import embed, text_fields
from partitioning import UserError
from partitioning.ranges import Range, check_fields


class Queue(nnx.Module):
    """The newest `size` keys, and where the next ones go."""

    def __init__(self, size: int, width: int, rngs: nnx.Rngs):
        self.keys = buffer(unit(jax.random.normal(rngs.params(), (size, width))))
        self.next = buffer(jnp.zeros((), jnp.int32))


@dataclass(frozen=True, kw_only=True)
class MomentumQueue(Objective):
    """Each row against its positive, embedded by a teacher, and a queue of earlier positives.

    loss = mean_i -log( exp(q_i k_i / T) / (exp(q_i k_i / T) + sum_j exp(q_i queue_j / T)) ).
    After the step, teacher = momentum * teacher + (1 - momentum) * trunk, and the batch's keys enter the queue.

    Args:
      size: keys in the queue, a multiple of the batch.
      momentum: of the teacher.
      temperature: T.
      pooling: mean, first or last.

    Raises:
      UserError: the batch does not divide the queue.

    Source: "Momentum Contrast for Unsupervised Visual Representation Learning", He et al., 2020.
    Differs: texts for images; the queue starts with random unit vectors.
    """

    size: Annotated[int, Range(1, 1 << 30)] = 4096
    momentum: Annotated[float, Range(0, 1)] = 0.999
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.05
    pooling: Pooling = "mean"

    def __post_init__(self):
        check_fields(self)

    def fields(self):
        """Pairs of texts."""
        return text_fields("query", "positive")

    def check(self, *, steps, batch):
        """See `Objective.check`."""
        super().check(steps=steps, batch=batch)
        rows = batch["query/tokens"][0][0]
        if self.size % rows:
            raise UserError(f"MomentumQueue.size = {self.size} is no multiple of the batch's {rows} rows")

    def companions(self, trunk, rngs):
        """The teacher, a copy of the trunk, and the queue."""
        return {"teacher": Companion(as_buffers(trunk)), "queue": Companion(Queue(self.size, trunk.width, rngs))}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        query = embed(models.trunk, batch, "query", key, self.pooling)
        keys = jax.lax.stop_gradient(embed(models.teacher, batch, "positive", None, self.pooling))
        own = (query * keys).sum(-1, keepdims=True)
        scores = jnp.concatenate([own, query @ models.queue.keys.get_value().T], axis=1) / self.temperature
        each = jax.nn.logsumexp(scores, axis=1) - scores[:, 0]
        rows = jnp.asarray(each.shape[0], jnp.float32)
        hits = (jnp.argmax(scores, axis=1) == 0).sum()
        term = Term(each.sum(), rows, 1.0, (each, jnp.ones_like(each)))
        return Loss({"infonce": term, "accuracy": metric(hits, rows)}, rows={"key": keys})

    def after_step(self, models, rows, stats, *, step):
        """The teacher moves and the keys enter the queue."""
        # Running statistics too: the teacher sees no batch to take its own from.
        trunk = dict(nnx.to_flat_state(nnx.state(models.module("trunk"), nnx.Any(nnx.Param, Buffer))))
        for path, old in nnx.to_flat_state(nnx.state(models.module("teacher"), Buffer)):
            # Tables of whole numbers are the trunk's for good.
            if path in trunk and jnp.issubdtype(old.get_value().dtype, jnp.floating):
                new = self.momentum * old.get_value() + (1 - self.momentum) * trunk[path].get_value()
                old.set_value(new.astype(old.get_value().dtype))
        queue = models.module("queue")
        place = queue.next.get_value()
        queue.keys.set_value(jax.lax.dynamic_update_slice_in_dim(queue.keys.get_value(), rows["key"], place, axis=0))
        queue.next.set_value((place + rows["key"].shape[0]) % self.size)
