"""Rewards of sampled text, computed on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """The share of the sampled tokens that are among `tokens`: a reward whose optimum is known, to see a policy move.

    Args:
      tokens: ids.
    """

    tokens: Sequence[int]

    def __call__(self, tokens: Int[np.ndarray, "N L"], drawn: Float[np.ndarray, "N L"]) -> Float[np.ndarray, N]:
        """From tokens and a mask over the sampled ones to one reward a row."""
        return (np.isin(tokens, list(self.tokens)) * drawn).sum(1) / np.maximum(drawn.sum(1), 1)
