"""Sequence to sequence learning: one text from another."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp

from objectives.base import Loss, Objective
from objectives.denoise import Side
from objectives.token_loss import TokenLoss
from objectives.two_sided import needs_both, taught


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Objective):
    """The encoder reads one text of a pair, the decoder writes the other.

    loss = -sum_t log p(y_t | y_{<t}, x) / T,  the decoder's first input being `EncoderDecoder.start`.

    Args:
      inputs, targets: the batch's names of x and y.
      penalty: what a prediction is charged.

    Raises:
      UserError: a trunk that is no encoder-decoder, or a batch without such texts.

    Source: "Sequence to Sequence Learning with Neural Networks", Sutskever et al., 2014.
    Differs: nothing known.
    """

    continues = "causal"

    inputs: str = "query"
    targets: str = "positive"
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def fields(self):
        """Both texts'."""
        text = super().fields()
        return tuple(f"{side}/{name}" for side in (self.inputs, self.targets) for name in text)

    def companions(self, trunk, rngs):
        """See `Objective.companions`: none."""
        needs_both(trunk, "Seq2Seq")
        return {}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        sides = (self.inputs, self.targets)
        read, written = (Side(*(batch[f"{side}/{name}"] for name in Side._fields)) for side in sides)
        hidden = taught(trunk, read, written, first=trunk.start, keys=key("dropout"))
        weight = (written.segments > 0).astype(jnp.float32)
        loss, accuracy = self.penalty(trunk.scores(hidden), written.tokens, weight)
        return Loss({"seq2seq": loss, "accuracy": accuracy})
