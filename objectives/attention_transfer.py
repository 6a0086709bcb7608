"""Attention transfer: linear attention learns to give what softmax attention gives."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from models.masks import Causal
from objectives.base import Loss, Objective, Term
from partitioning import UserError


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Objective):
    """The first step of LoLCATs: each linearised layer is drawn to the softmax attention with its own weights.

    loss = mean over layers and tokens of |y_softmax - y_linear|^2 / (H K),  y before the output projection. Every layer reads
    what the softmax model's layers before it give, so layers do not wait for each other. All but the feature maps and the
    window factors belongs frozen: `training.Run.freeze`.

    Source: "LoLCATs: On Low-Rank Linearizing of Large Language Models", Zhang et al., 2024.
    Differs: nothing known.
    """

    continues = "causal"

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        out = models.trunk(
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Causal(),
            keys=key("dropout"),
            taps=("transfer",),
        )
        errors = list(out.taps["transfer"].values())
        if not errors:
            raise UserError(
                "AttentionTransfer: no layer of the trunk is linearised: bind LinearizedAttention as its attention"
            )
        here = (batch["segments"] > 0).astype(errors[0].dtype)
        rows = (jnp.stack(errors).mean(0) * here).sum(-1), here.sum(-1)
        return Loss({"transfer": Term(rows[0].sum(), rows[1].sum(), rows=rows)})
