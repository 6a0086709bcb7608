"""Masked diffusion language modelling."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import jax
import jax.numpy as jnp

from models.masks import Bidirectional
from objectives.base import Loss, Objective, metric
from objectives.token_loss import TokenLoss
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Objective):
    """A bound on the likelihood: mask each token with probability t, predict it, weigh by 1 / t.

    loss = E_t sum_{masked i} (1 / t) (-log p(x_i | x_t)) / (number of tokens),  t = least + (1 - least) u,
    u = (u_0 + row / rows) mod 1: one draw a step, spread evenly over the rows. The network never predicts the mask
    token, and what is not masked is copied, so its loss is 0.

    Args:
      least: the smallest t.
      penalty: what a prediction is charged.

    Source: "Simple and Effective Masked Diffusion Language Models", Sahoo et al., 2024.
    Differs: special tokens are never masked; the trunk is not told t.
    """

    least: Annotated[float, Range(1e-6, 1)] = 1e-3
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def __post_init__(self):
        check_fields(self)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        tokens, trunk = batch["tokens"], models.trunk
        spread = batch["row"] / key.total
        time = self.least + (1 - self.least) * jnp.mod(jax.random.uniform(key.batch("time")) + spread, 1.0)
        can = (batch["segments"] > 0) & ~trunk.vocabulary.is_special(tokens)
        draw = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(key("mask"))
        masked = can & (draw < time[:, None])
        out = trunk(
            jnp.where(masked, trunk.vocabulary.mask, tokens),
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Bidirectional(),
            keys=key("dropout"),
        )
        scores = trunk.scores(out.hidden)
        rows = scores.table.shape[0]
        never = jnp.where(jnp.arange(rows) == trunk.vocabulary.mask, -1e30, 0.0)
        scores = replace(scores, bias=never if scores.bias is None else scores.bias + never)
        loss, _ = self.penalty(scores, tokens, masked / time[:, None])
        assert loss.rows is not None
        count = can.sum().astype(jnp.float32)
        per_row = (loss.rows[0], can.sum(1).astype(jnp.float32))
        return Loss({"bound": replace(loss, weight=count, rows=per_row), "masked": metric(masked.sum(), count)})
