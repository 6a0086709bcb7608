"""Masked sequence to sequence pre-training."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp

from objectives.base import Loss
from objectives.denoise import Side
from objectives.fragment import Fragment
from objectives.masked_lm import Masking
from objectives.select import Select
from objectives.two_sided import needs_both, taught


@dataclass(frozen=True, kw_only=True)
class MASS(Masking):
    """The encoder reads a text without a fragment, the decoder writes the fragment and sees nothing else of the text.

    loss = -sum_{t in u..v} log p(x_t | x_{u..t-1}, x~) / (v - u + 1),  u..v from `select`, x~ from `replace`. At u the decoder
    reads the mask token; places are those in the text. One token is masked language modelling, all of them are a causal one.

    Args:
      select: the fragment.
      replace, penalty: as in `Masking`.

    Raises:
      UserError: a trunk that is no encoder-decoder.

    Source: "MASS: Masked Sequence to Sequence Pre-training for Language Generation", Song et al., 2019.
    Differs: each document of a packed row has a fragment; the decoder's inputs are not corrupted, and the first is the mask
      token as in the paper, where the released code gives the token before the fragment.
    """

    select: Select = field(default_factory=Fragment)

    def companions(self, trunk, rngs):
        """See `Objective.companions`: none."""
        needs_both(trunk, "MASS")
        return {}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        hidden, seen = self.hide(batch, trunk, step=step, key=key)
        there = hidden.weight > 0
        tokens, segments, positions = (hidden.gather(batch[name]) for name in Side._fields)
        written = Side(tokens, jnp.where(there, segments, 0), jnp.where(there, positions, 0))
        read = Side(seen, batch["segments"], batch["positions"])
        states = taught(trunk, read, written, first=trunk.vocabulary.mask, keys=key("dropout"))
        loss, accuracy = self.penalty(trunk.scores(states), tokens, hidden.weight)
        return Loss({"mass": loss, "accuracy": accuracy})
