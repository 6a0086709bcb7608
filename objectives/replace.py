"""What a hidden token is replaced with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from models.vocabulary import Vocabulary
from objectives.draws import Draws
from objectives.select import Selection
from partitioning import UserError
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Replace:
    """The mask token, a random ordinary token, or nothing, each with its probability.

    Args:
      mask: probability of the mask token.
      random: probability of a random token; the rest keep what they are.

    Raises:
      UserError: probabilities that sum to more than 1.

    Source: "BERT", Devlin et al., 2019 (0.8, 0.1).
    Differs: nothing known.
    """

    mask: Annotated[float, Range(0, 1)] = 0.8
    random: Annotated[float, Range(0, 1)] = 0.1

    def __post_init__(self):
        check_fields(self)
        if self.mask + self.random > 1 + 1e-9:
            raise UserError(
                f"Replace.mask + Replace.random = {self.mask + self.random:g}: probabilities sum to at most 1"
            )

    def __call__(
        self, tokens: Int[Array, "B S"], hide: Selection, vocabulary: Vocabulary, *, key: Draws
    ) -> Int[Array, "B S"]:
        """The corrupted tokens."""
        shape = hide.positions.shape[1:]
        draw = jax.vmap(lambda k: jax.random.uniform(k, shape))(key("replace"))
        other = jax.vmap(lambda k: vocabulary.random_ordinary(k, shape))(key("replace/token"))
        old = hide.gather(tokens)
        new = jnp.where(draw < self.mask, vocabulary.mask, jnp.where(draw < self.mask + self.random, other, old))
        return hide.scatter(tokens, new.astype(tokens.dtype))
