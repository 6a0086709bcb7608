"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from models.masks import Causal
from objectives.base import Companion, Loss, Objective, Term, metric
from objectives.cross_entropy import log_probabilities
from objectives.embedding import text_fields
from objectives.token_loss import shifted
from partitioning.ranges import Range, check_fields


def response_log_probability(tree, batch, name, key):
    """Sum of log p over a text's response tokens (where `loss_mask` is 1), for each row, `[B]`."""
    part = {field: batch[f"{name}/{field}"] for field in ("tokens", "segments", "positions", "loss_mask")}
    keys = None if key is None else key(f"dropout/{name}")
    out = tree(part["tokens"], segments=part["segments"], positions=part["positions"], mask=Causal(), keys=keys)
    targets, weight = shifted(part)
    return (log_probabilities(tree.scores(out.hidden), targets) * weight).sum(1)


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Prefer the chosen response to the rejected one, relative to a frozen copy of the first trunk.

    loss = mean -log sigmoid( beta [ (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected) ] ).

    Args:
      beta: how far the policy may move.
      smoothing: probability that a preference is the wrong way round.

    Source: "Direct Preference Optimization", Rafailov et al., 2023; smoothing: its conservative form.
    Differs: nothing known.
    """

    continues = "causal"

    beta: Annotated[float, Range(0, 1e4)] = 0.1
    smoothing: Annotated[float, Range(0, 0.5)] = 0.0

    def __post_init__(self):
        check_fields(self)

    def fields(self):
        """Preferences: prompt and response together, with a mask over the response."""
        return (*text_fields("chosen", "rejected"), "chosen/loss_mask", "rejected/loss_mask")

    def companions(self, trunk, rngs):
        """The reference: the trunk as it was at the start, frozen."""
        return {"reference": Companion(nnx.clone(trunk), train=False)}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        gain = {}
        for name in ("chosen", "rejected"):
            ours = response_log_probability(models.trunk, batch, name, key)
            theirs = jax.lax.stop_gradient(response_log_probability(models.reference, batch, name, None))
            gain[name] = ours - theirs
        margin = self.beta * (gain["chosen"] - gain["rejected"])
        each = -(1 - self.smoothing) * jax.nn.log_sigmoid(margin) - self.smoothing * jax.nn.log_sigmoid(-margin)
        rows = jnp.asarray(each.shape[0], jnp.float32)
        return Loss(
            {
                "dpo": Term(each.sum(), rows, 1.0, (each, jnp.ones_like(each))),
                "accuracy": metric((margin > 0).sum(), rows),
                "margin": metric(margin.sum(), rows),
            }
        )
