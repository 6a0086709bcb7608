"""The unigram model: what a token's frequency alone predicts, the least that a trained model must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evaluation.reading import opened

ROWS, LENGTH = 256, 512


@dataclass(frozen=True, eq=False)
class Unigram:
    """p(v) = (count(v) + 1) / (N + V) over the V ordinary tokens; specials have none.

    Args:
      counts: how often each id occurs, `[vocabulary]`, 0 for specials.
      ordinary: which ids are not special.
    """

    counts: Int[np.ndarray, " V"]
    ordinary: np.ndarray

    @property
    def log_probabilities(self) -> Float[np.ndarray, " V"]:
        """log p of every id; a special's is 0 and never read."""
        smooth = self.counts + 1.0
        total = smooth[self.ordinary].sum()
        return np.where(self.ordinary, np.log(smooth / total), 0.0).astype(np.float32)

    @property
    def likeliest(self) -> int:
        """The most frequent id, the guess that is right most often."""
        return int(np.argmax(np.where(self.ordinary, self.counts, -1)))


def count(data: Any, tokenizer: Any) -> Unigram:
    """Counts the tokens of a data description, each source read once."""
    specials = [int(v) for v in vars(tokenizer.specials).values()]
    ordinary = ~np.isin(np.arange(tokenizer.vocabulary), specials)
    counts = np.zeros(tokenizer.vocabulary, np.int64)
    for reader in opened(data, tokenizer):
        for step in range(-(-reader.rows(length=LENGTH) // ROWS)):
            batch = reader.batch(step, batch_size=ROWS, length=LENGTH, seed=0)
            counts += np.bincount(batch["tokens"][batch["segments"] > 0], minlength=len(counts))
    return Unigram(np.where(ordinary, counts, 0), ordinary)
