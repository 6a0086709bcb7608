"""Exact search: the documents with the highest inner products, without all scores in memory at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def top(
    queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "N D"], k: int, *, chunk: int = 4096
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """The k highest inner products of each query, highest first; of equal ones the lower number comes first.

    Args:
      queries, documents: vectors.
      k: how many; all where there are fewer documents.
      chunk: documents whose scores are held at once, and queries searched at once.

    Returns:
      (scores, document numbers).
    """
    k = min(k, len(documents))
    scores, numbers = [], []
    for start in range(0, len(queries), chunk):
        part = jnp.asarray(queries[start : start + chunk])
        best = jnp.full((len(part), k), -jnp.inf), jnp.zeros((len(part), k), jnp.int32)
        for first in range(0, len(documents), chunk):
            best = _better(part, jnp.asarray(documents[first : first + chunk]), first, *best, k=k)
        scores.append(np.asarray(best[0]))
        numbers.append(np.asarray(best[1]))
    return np.concatenate(scores), np.concatenate(numbers)


@partial(jax.jit, static_argnames="k")
def _better(
    queries: Float[Array, "Q D"],
    documents: Float[Array, "n D"],
    first: Int[Array, ""],
    scores: Float[Array, "Q k"],
    numbers: Int[Array, "Q k"],
    *,
    k: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The best so far, and of a further chunk of documents whose first has the number `first`."""
    found = jnp.einsum("qd,nd->qn", queries, documents, preferred_element_type=jnp.float32)
    own, place = jax.lax.top_k(found, min(k, documents.shape[0]))
    # Earlier documents stand first, and of equal scores `top_k` takes the first.
    scores, numbers = jnp.concatenate([scores, own], 1), jnp.concatenate([numbers, first + place], 1)
    scores, chosen = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(numbers, chosen, axis=1)
