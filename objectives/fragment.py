"""A selection of one run of tokens in every document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from objectives.denoise import most
from objectives.documents import bodies, documents
from objectives.select import Select, Selection
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Fragment(Select):
    """One run of round(share n) of a document's n tokens, at least one, anywhere with equal probability.

    A special token at a document's beginning or end is never in it.

    Args:
      share: of the tokens.

    Source: "MASS", Song et al., 2019.
    Differs: every place is as likely; the released code prefers a document's beginning and end.
    """

    share: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self):
        check_fields(self)

    def __call__(self, batch, vocabulary, *, step, key):
        """See `Select.__call__`."""
        length = batch["tokens"].shape[1]
        body = bodies(batch["tokens"], documents(batch["segments"], batch["positions"]), vocabulary)
        sizes = np.arange(length + 1)
        table = np.where(sizes > 0, np.maximum(np.round(sizes * self.share), 1), 0).astype(np.int32)
        count = jnp.asarray(table)[body.size]
        draw = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(key("fragment"))
        start = body.start + jnp.floor(body.first(draw) * (body.size - count + 1)).astype(jnp.int32)
        slots = jnp.arange(length)
        hidden = (slots >= start) & (slots < start + count)
        chosen = jnp.sort(jnp.where(hidden, slots, length), axis=1)[:, : max(most(table), 1)]
        return Selection(jnp.minimum(chosen, length - 1), (chosen < length).astype(jnp.float32))
