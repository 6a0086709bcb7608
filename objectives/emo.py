"""Earth mover's distance beside cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.masks import Causal
from models.pooling import unit
from models.variables import param
from objectives.base import Companion, Loss, Objective, Term, metric
from objectives.cross_entropy import in_chunks
from objectives.token_loss import shifted
from partitioning.ranges import Range, check_fields


class Cost(nnx.Module):
    """Frozen unit vectors of the tokens: moving mass from v to w costs 1 - cos(v, w)."""

    def __init__(self, table: Float[Array, "V D"]):
        self.table = param(unit(table), ("vocab", "embed"))


@dataclass(frozen=True, kw_only=True)
class EMO(Objective):
    """Charge a prediction by how far its probability lies from the target in embedding space, beside how little it is.

    loss = mean_t 1/2 ( CE_t + [CE_t / D_t] D_t ),  D_t = 1 - e_y . sum_v q_t(v) e_v,
    q_t the model's distribution, e the unit rows of a frozen copy of the first embeddings, [.] without gradient.

    Args:
      tokens_per_chunk: about how many tokens' logits are in memory at once.

    Source: "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling", Ren et al., 2023.
    Differs: the costs are the trunk's embeddings at the start of the run, where the paper takes a trained model's.
    """

    continues = "causal"

    tokens_per_chunk: Annotated[int, Range(1, 1 << 30)] = 768

    def __post_init__(self):
        check_fields(self)

    def companions(self, trunk, rngs):
        """The costs."""
        return {"cost": Companion(Cost(trunk.table.get_value()), train=False)}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk = models.trunk
        out = trunk(
            batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            mask=Causal(),
            keys=key("dropout"),
        )
        targets, weight = shifted(batch)
        scores, costs = trunk.scores(out.hidden), models.cost.table.get_value()

        def both(hidden: Any, target: Any) -> Any:
            logits = replace(scores, hidden=hidden).logits()
            wrong = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
            mean = jax.nn.softmax(logits) @ costs[: scores.size].astype(logits.dtype)
            far = 1 - (mean * costs[target]).sum(-1)
            balance = jax.lax.stop_gradient(wrong / jnp.maximum(far, 1e-6))
            return jnp.stack([0.5 * (wrong + balance * far), wrong, far], axis=-1)

        each, wrong, far = jnp.moveaxis(
            in_chunks(both, scores.hidden, targets, tokens_per_chunk=self.tokens_per_chunk), -1, 0
        )
        count = weight.sum()
        rows = ((each * weight).sum(1), weight.sum(1))
        return Loss(
            {
                "emo": Term((each * weight).sum(), count, 1.0, rows),
                "cross_entropy": metric((wrong * weight).sum(), count),
                "distance": metric((far * weight).sum(), count),
            }
        )
