"""Masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Int

from models.masks import Bidirectional
from objectives.base import Batch, Loss, Objective
from objectives.draws import Draws
from objectives.embedding import routes
from objectives.replace import Replace
from objectives.select import RandomTokens, Select, Selection
from objectives.token_loss import TokenLoss


@dataclass(frozen=True, kw_only=True)
class Masking(Objective):
    """Base of the objectives that hide tokens of a text.

    Args:
      select: which tokens.
      replace: what the model sees instead.
      penalty: what a prediction is charged.
    """

    select: Select = field(default_factory=RandomTokens)
    replace: Replace = field(default_factory=Replace)
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def fields(self):
        """The text's, and those of the selection."""
        return (*super().fields(), *self.select.fields())

    def check(self, *, steps, batch):
        """See `Objective.check`; the selection's schedules too."""
        super().check(steps=steps, batch=batch)
        self.select.check(steps)

    def hide(self, batch: Batch, trunk: Any, *, step: Any, key: Draws) -> tuple[Selection, Int[Array, "B S"]]:
        """The hidden positions, and the text as the model sees it."""
        hidden = self.select(batch, trunk.vocabulary, step=step, key=key)
        return hidden, self.replace(batch["tokens"], hidden, trunk.vocabulary, key=key)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Masking):
    """Predict the tokens that a selection hides.

    loss = -sum_i w_i log p(x_i | x~) / sum_i w_i,  (i, w) from `select`, x~ from `replace`.

    Args:
      select, replace, penalty: as in `Masking`.

    Source: "BERT", Devlin et al., 2019.
    Differs: no next-sentence prediction.
    """

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        hidden, seen = self.hide(batch, trunk, step=step, key=key)
        out = trunk(
            seen,
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Bidirectional(),
            keys=key("dropout"),
            at=hidden.positions,
            **routes(batch),
        )
        loss, accuracy = self.penalty(trunk.scores(out.hidden), hidden.gather(batch["tokens"]), hidden.weight)
        return Loss({"mlm": loss, "accuracy": accuracy})
