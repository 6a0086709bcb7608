"""Prefix language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp

from models.masks import Prefix
from objectives.base import Loss, Objective, metric
from objectives.documents import documents
from objectives.token_loss import TokenLoss, shifted
from partitioning import UserError
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """Read the beginning of a document in both directions, predict the rest from left to right.

    loss = -sum_{t >= k} w_t log p(x_t | x_{<t}) / sum_{t >= k} w_t,  k = floor(n u) of n tokens, u uniform in
    [least, most) for each document; tokens before k see each other. w as in `CausalLM`.

    Args:
      least, most: bounds of the prefix's share; 0 and 0 is `CausalLM`.
      penalty: what a prediction is charged.

    Raises:
      UserError: `least` above `most`.

    Source: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", Raffel et al., 2020.
    Differs: prefix and rest are one row of one decoder, each document of a packed row with a prefix of its own.
    """

    continues = "prefix"

    least: Annotated[float, Range(0, 1)] = 0.0
    most: Annotated[float, Range(0, 1)] = 1.0
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def __post_init__(self):
        check_fields(self)
        if self.least > self.most:
            raise UserError(
                f"PrefixLM.least = {self.least:g} is above PrefixLM.most = {self.most:g}: at most that is wanted"
            )

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        segments, positions, trunk = batch["segments"], batch["positions"], models.trunk
        found = documents(segments, positions)
        draw = jax.vmap(lambda k: jax.random.uniform(k, segments.shape[1:]))(key("prefix"))
        share = found.first(self.least + (self.most - self.least) * draw)
        inside = positions < jnp.floor(share * found.size)
        out = trunk(batch["tokens"], segments=segments, positions=positions, mask=Prefix(inside), keys=key("dropout"))
        targets, weight = shifted(batch)
        weight = weight * ~jnp.pad(inside[:, 1:], ((0, 0), (0, 1)))
        loss, accuracy = self.penalty(trunk.scores(out.hidden), targets, weight)
        prefix = metric(inside.sum(), (segments > 0).sum())
        return Loss({"prefix_lm": loss, "accuracy": accuracy, "prefix": prefix})
