"""Mask-enhanced autoregressive prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.masks import Causal
from objectives.base import Loss
from objectives.masked_lm import Masking
from objectives.replace import Replace
from objectives.token_loss import shifted


@dataclass(frozen=True, kw_only=True)
class MEAP(Masking):
    """Hide some tokens of a causal model's input; every next token is predicted all the same.

    loss = -sum_t w_t log p(x_{t+1} | x~_{<=t}) / sum_t w_t,  x~ from `select` and `replace`, w as in `CausalLM`.

    Args:
      select: which tokens, 15 % by default.
      replace: what the model sees instead, always the mask token by default.
      penalty: what a prediction is charged.

    Source: "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", Zhuang et al., 2025.
    Differs: special tokens are not hidden; in fine-tuning there is no second, whole copy of the text.
    """

    continues = "causal"

    replace: Replace = field(default_factory=lambda: Replace(mask=1.0, random=0.0))

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        _, seen = self.hide(batch, trunk, step=step, key=key)
        out = trunk(seen, segments=batch["segments"], positions=batch["positions"], mask=Causal(), keys=key("dropout"))
        targets, weight = shifted(batch)
        loss, accuracy = self.penalty(trunk.scores(out.hidden), targets, weight)
        return Loss({"clm": loss, "accuracy": accuracy})
