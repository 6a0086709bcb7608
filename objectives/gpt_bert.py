"""Masked and causal language modelling in one network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool

from models.masks import Bidirectional, ByRow, Causal
from objectives.base import Batch, Loss
from objectives.masked_lm import Masking
from objectives.select import Selection
from objectives.token_loss import shifted
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class GPTBert(Masking):
    """Some rows are causal, the others masked; in both, the state before a token predicts it.

    loss = ratio * L_masked + (1 - ratio) * L_causal, each a mean over its own targets; the share of masked rows is
    `ratio` too, as evenly spread over the batch as it goes.

    Args:
      ratio: share of masked rows, and the weight of their term.
      select, replace, penalty: as in `Masking`.

    Source: "GPT or BERT: why not both?", Charpentier and Samuel, 2024.
    Differs: rows, not devices, are divided between the modes.
    """

    continues = "causal"

    ratio: Annotated[float, Range(0, 1)] = 15 / 16

    def __post_init__(self):
        check_fields(self)

    def masked(self, batch: Batch) -> Bool[Array, B]:
        """Which rows are masked; the others are read from left to right."""
        return jnp.floor((batch["row"] + 1) * self.ratio) > jnp.floor(batch["row"] * self.ratio)

    def hide(self, batch, trunk, *, step, key):
        """See `Masking.hide`; a row that is not masked hides nothing."""
        masked = self.masked(batch)[:, None]
        hidden, seen = super().hide(batch, trunk, step=step, key=key)
        return Selection(hidden.positions, hidden.weight * masked), jnp.where(masked, seen, batch["tokens"])

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        tokens, trunk = batch["tokens"], models.trunk
        masked = self.masked(batch)
        hide, seen = self.hide(batch, trunk, step=step, key=key)
        # The first token of a document has no state before it to be predicted from.
        counted = hide.gather(batch["positions"]) > 0
        out = trunk(
            seen,
            segments=batch["segments"],
            positions=batch["positions"],
            mask=ByRow(masked, Bidirectional(), Causal()),
            keys=key("dropout"),
        )
        before = Selection(jnp.maximum(hide.positions - 1, 0), hide.weight)
        mlm, right = self.penalty(trunk.scores(before.gather(out.hidden)), hide.gather(tokens), hide.weight * counted)
        targets, weight = shifted(batch)
        clm, causal_right = self.penalty(trunk.scores(out.hidden), targets, weight * ~masked[:, None])
        terms = {"masked": mlm.scaled(self.ratio), "causal": clm.scaled(1 - self.ratio)}
        return Loss({**terms, "masked_accuracy": right, "causal_accuracy": causal_right})
