"""Group-relative policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from models.decoding.sampling import sample
from models.masks import Causal
from objectives.base import Loss, Objective, Term, metric
from objectives.cross_entropy import log_probabilities
from objectives.embedding import text_fields
from partitioning.ranges import Range, check_fields

Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    """Sample several continuations of every prompt, reward them on the host, and favour those above their group's mean.

    loss = -mean over samples of (1 / T_i) sum_t min( r_it A_i, clip(r_it, 1 - clip, 1 + clip) A_i ),
    r_it = p(x_t) / p_old(x_t),  A_i = (R_i - mean R) / (std R + 1e-4) over the samples of one prompt.

    Args:
      reward: from tokens and a mask over the sampled ones, `[N, L]` each, to rewards `[N]`; runs on the host.
      samples: of each prompt.
      length: most tokens to draw.
      temperature: of the draws.
      clip: how far the ratio may leave 1.

    Source: "DeepSeekMath", Shao et al., 2024.
    Differs: one update a sample and no divergence term, so the ratio is 1 up to rounding and only its gradient counts.
    """

    continues = "causal"
    # The samples' old probabilities are those of the model that drew them.
    runs_twice = True

    reward: Reward
    samples: Annotated[int, Range(2, 1 << 20)] = 4
    length: Annotated[int, Range(1, 1 << 20)] = 32
    temperature: Annotated[float, Range(1e-4, 1e4)] = 1.0
    clip: Annotated[float, Range(0, 1)] = 0.2

    def __post_init__(self):
        check_fields(self)

    def fields(self):
        """Prompts."""
        return text_fields("prompt")

    def prepare(self, models, batch, *, step, key):
        """Samples, their rewards and their advantages."""
        rows = batch["row"].shape[0]
        again = lambda x: jnp.repeat(x, self.samples, axis=0)
        drawn = sample(
            models.trunk,
            again(batch["prompt/tokens"]),
            again(batch["prompt/segments"]),
            length=self.length,
            keys=key.spread(self.samples)("sample"),
            temperature=self.temperature,
        )
        shape = jax.ShapeDtypeStruct((rows * self.samples,), jnp.float32)
        judge = lambda tokens, mask: np.asarray(self.reward(np.asarray(tokens), np.asarray(mask)), np.float32)
        reward = jax.pure_callback(judge, shape, drawn.tokens, drawn.drawn).reshape(rows, self.samples)
        spread = reward.std(1, keepdims=True) + 1e-4
        group = lambda x: x.reshape(rows, self.samples, *x.shape[1:])
        return batch | {
            "grpo/tokens": group(drawn.tokens),
            "grpo/segments": group(drawn.segments),
            "grpo/positions": group(drawn.positions),
            "grpo/drawn": group(drawn.drawn),
            "grpo/old": group(drawn.log_probability),
            "grpo/reward": reward,
            "grpo/advantage": (reward - reward.mean(1, keepdims=True)) / spread,
        }

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        flat = lambda name: batch[f"grpo/{name}"].reshape(-1, *batch[f"grpo/{name}"].shape[2:])
        tokens, drawn = flat("tokens"), flat("drawn")
        out = models.trunk(tokens, segments=flat("segments"), positions=flat("positions"), mask=Causal())
        # A continuation's first token is predicted at the prompt's end, which may lie before padding.
        index = jnp.arange(tokens.shape[1])
        seen = flat("segments") > 0
        before = jax.lax.cummax(jnp.where(seen, index, 0), axis=1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        hidden = jnp.take_along_axis(out.hidden, before[..., None], axis=1)
        # Tempered behind the head, which may bend or normalise the states.
        scores = models.trunk.scores(hidden).tempered(self.temperature)
        ratio = jnp.exp((log_probabilities(scores, tokens) - flat("old")) * drawn)
        advantage = batch["grpo/advantage"].reshape(-1, 1)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - self.clip, 1 + self.clip) * advantage)
        each = (-(gain * drawn).sum(1) / jnp.maximum(drawn.sum(1), 1)).reshape(batch["grpo/reward"].shape)
        count = jnp.asarray(each.size, jnp.float32)
        rows = (each.sum(1), jnp.full(each.shape[:1], each.shape[1], jnp.float32))
        terms = {"grpo": Term(each.sum(), count, 1.0, rows), "reward": metric(batch["grpo/reward"].sum(), count)}
        return Loss(terms | {"length": metric(drawn.sum(), count)})
