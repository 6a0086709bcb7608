"""Masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.masks import Bidirectional
from objectives.base import Loss, Objective
from objectives.replace import Replace
from objectives.select import RandomTokens, Select
from objectives.token_loss import TokenLoss


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Objective):
    """Predict the tokens that a selection hides.

    loss = -sum_i w_i log p(x_i | x~) / sum_i w_i,  (i, w) from `select`, x~ from `replace`.

    Args:
      select: which tokens.
      replace: what the model sees instead.
      penalty: what a prediction is charged.

    Source: "BERT", Devlin et al., 2019.
    Differs: no next-sentence prediction.
    """

    select: Select = field(default_factory=RandomTokens)
    replace: Replace = field(default_factory=Replace)
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def check(self, *, steps, batch):
        """See `Objective.check`."""
        super().check(steps=steps, batch=batch)
        self.select.check(steps)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        hide = self.select(batch, trunk.vocabulary, step=step, key=key)
        seen = self.replace(batch["tokens"], hide, trunk.vocabulary, key=key)
        out = trunk(
            seen,
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Bidirectional(),
            keys=key("dropout"),
        )
        loss, accuracy = self.penalty(trunk.scores(hide.gather(out.hidden)), hide.gather(batch["tokens"]), hide.weight)
        return Loss({"mlm": loss, "accuracy": accuracy})
