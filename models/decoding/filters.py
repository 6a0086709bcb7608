"""Filters of logits: each leaves the scores of some tokens alone and takes the others out of the draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from partitioning.ranges import Range, check_fields

Filter = Callable[[Float[Array, "B V"]], Float[Array, "B V"]]


def _at_least(logits: Float[Array, "B V"], least: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(logits >= least, logits, -jnp.inf)


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Keeps the k likeliest tokens, and those that are as likely as the last of them.

    Args:
      k: how many; all of a smaller vocabulary.

    Source: "Hierarchical Neural Story Generation", Fan et al., 2018.
    Differs: nothing known.
    """

    k: Annotated[int, Range(1, 1 << 30)]

    def __post_init__(self):
        check_fields(self)

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, minus infinity for what is out."""
        best, _ = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))
        return _at_least(logits, best[:, -1:])


@dataclass(frozen=True, kw_only=True)
class TopP:
    """Keeps the smallest set of likeliest tokens whose probabilities sum to p or more.

    A token stays when those likelier than it sum to less than p; so the best stays always, and what is as likely as the
    last that stays.

    Args:
      p: the mass to keep; 1 keeps all.

    Source: "The Curious Case of Neural Text Degeneration", Holtzman et al., 2020.
    Differs: nothing known.
    """

    p: Annotated[float, Range(0, 1)]

    def __post_init__(self):
        check_fields(self)

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, minus infinity for what is out."""
        if self.p == 1:
            # Rounded sums can reach 1 before the last token.
            return logits
        ordered = -jnp.sort(-logits, axis=-1)
        chances = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        kept = (before < self.p).at[:, 0].set(True)
        return _at_least(logits, jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True))


@dataclass(frozen=True, kw_only=True)
class MinP:
    """Keeps the tokens that are at least p times as likely as the likeliest.

    Args:
      p: a share of the largest probability; 0 keeps all.

    Source: "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", Nguyen et al., 2024.
    Differs: nothing known.
    """

    p: Annotated[float, Range(0, 1)]

    def __post_init__(self):
        check_fields(self)

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """The logits, minus infinity for what is out."""
        return _at_least(logits, logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(self.p, logits.dtype)))
