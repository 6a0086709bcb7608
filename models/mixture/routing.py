"""What a router decides: which experts get which tokens, with which weights."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from partitioning import on_each_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Each token has k experts.

    Args:
      chosen: the experts of each token.
      weights: what their results are multiplied by.
      taken: 1 where a token goes to an expert, else 0, without a gradient; a choice of an expert that is hidden from the token
        has weight 0 and is none.
      shares: of each token, the probabilities of the experts, for the balance term; None where nothing is learned.
      logits: of the experts, for the z term; None where nothing is learned.
      bias: what was added to the experts' scores to choose by, for figures; None for nothing.
    """

    chosen: Int[Array, "B S k"]
    weights: Float[Array, "B S k"]
    taken: Float[Array, "B S E"]
    shares: Float[Array, "B S E"] | None = None
    logits: Float[Array, "B S E"] | None = None
    bias: Float[Array, E] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Picks:
    """Each expert has C tokens of each row; the rest as in `Routing`.

    Args:
      slots: of each expert's tokens; padding where there are no others.
      weights: what the expert's results are multiplied by; 0 for padding.
    """

    slots: Int[Array, "B E C"]
    weights: Float[Array, "B E C"]
    taken: Float[Array, "B S E"]
    shares: Float[Array, "B S E"] | None = None
    logits: Float[Array, "B S E"] | None = None
    bias: Float[Array, E] | None = None


def largest(
    scores: Float[Array, "*B E"], k: int, names: tuple[str | None, ...] = ("batch", "length")
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"]]:
    """The k largest of the last dimension and where they are, on the device of each token: compilers do not cut a search.

    Args:
      scores: of anything.
      k: how many.
      names: logical names of the first dimensions; the others are not cut.
    """
    names = (*names, *(None,) * (scores.ndim - len(names)))
    shape = (*scores.shape[:-1], k)
    return on_each_device(lambda part: tuple(jax.lax.top_k(part, k)), [(scores, names)], [(shape, names)] * 2)


def took(
    chosen: Int[Array, "*B k"], experts: int, dtype: jnp.dtype, where: Bool[Array, "*B k"] | None = None
) -> Float[Array, "*B E"]:
    """1 where a token goes to an expert, else 0.

    Args:
      chosen: its experts.
      experts: how many there are.
      dtype: of the result.
      where: which choices count; None for all.
    """
    each = jax.nn.one_hot(chosen, experts, dtype=dtype)
    return (each if where is None else each * where[..., None]).sum(-2)
