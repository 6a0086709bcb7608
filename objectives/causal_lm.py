"""Causal language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.masks import Causal
from objectives.base import Loss, Objective
from objectives.token_loss import TokenLoss, shifted


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Predict every token from those before it in its document.

    loss = -sum_t w_t log p(x_{t+1} | x_{<=t}) / sum_t w_t.  w is 1 where the next token is of the same document, times
    the batch's `loss_mask` where there is one.

    Args:
      penalty: what a prediction is charged.

    Source: "Improving Language Understanding by Generative Pre-Training", Radford et al., 2018.
    Differs: nothing known.
    """

    continues = "causal"

    penalty: TokenLoss = field(default_factory=TokenLoss)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        out = models.trunk(
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Causal(),
            keys=key("dropout"),
        )
        targets, weight = shifted(batch)
        loss, accuracy = self.penalty(models.trunk.scores(out.hidden), targets, weight)
        return Loss({"clm": loss, "accuracy": accuracy})
