"""Causal masking: spans moved to the end of their document."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from models.masks import Causal
from models.vocabulary import Vocabulary
from objectives.base import Loss, Objective, metric
from objectives.denoise import Noise, behind, extra, longer, most, whole_text
from objectives.documents import bodies, documents, ranks
from objectives.draws import Draws
from objectives.token_loss import TokenLoss, shifted
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class CM3(Objective):
    """Put sentinels for a few spans, write the spans behind the document, and predict all of it from left to right.

    loss = mean_t -log p(y_t | y_{<t}) over the y_t that are no sentinels,  y = `a S1 c S2 S1 b end S2 d e end`.
    Of a document min(Poisson(mean), most) spans are moved; their borders are a uniform choice among all.

    Args:
      mean: expected number of spans.
      most: the largest number of spans; 0 is `CausalLM`.
      shortest: documents with fewer tokens are left whole; the larger, the less the rows grow.
      penalty: what a prediction is charged.

    Source: "CM3: A Causal Masked Multimodal Model of the Internet", Aghajanyan et al., 2022, and its released code.
    Differs: at most 4 spans, not 16, and no two spans touch; a special token at a document's beginning or end is kept.
    """

    continues = "causal"

    mean: Annotated[float, Range(0, 16)] = 1.0
    most: Annotated[int, Range(0, 64)] = 4
    shortest: Annotated[int, Range(2, 1 << 20)] = 32
    penalty: TokenLoss = field(default_factory=TokenLoss)

    def __post_init__(self):
        check_fields(self)

    def check(self, *, steps, batch):
        """See `Objective.check`; a `loss_mask` is refused."""
        super().check(steps=steps, batch=batch)
        whole_text(type(self).__name__, batch)

    def room(self, length: int) -> int:
        """The most tokens that a row of `length` tokens can become."""
        size = np.arange(length + 1)
        spans = np.where(size < self.shortest, 0, np.minimum(self.most, (size + 1) // 2))
        return longer(length, most(size + 3 * spans))

    def noise(self, batch: dict[str, Any], vocabulary: Vocabulary, *, key: Draws) -> Noise:
        """What is moved in a batch."""
        found = documents(batch["segments"], batch["positions"])
        body = bodies(batch["tokens"], found, vocabulary)
        length = batch["tokens"].shape[1]
        slots = jnp.arange(length)
        draw = lambda name: jax.vmap(lambda k: jax.random.uniform(k, (length,)))(key(name))
        # P(Poisson <= i): what is above `most` counts as `most`.
        chances = [math.exp(-self.mean) * self.mean**i / math.factorial(i) for i in range(self.most)]
        below = jnp.asarray(np.cumsum(chances), jnp.float32)
        spans = (found.first(draw("count"))[..., None] >= below).sum(-1)
        spans = jnp.where(body.size < self.shortest, 0, jnp.minimum(spans, (body.size + 1) // 2))
        # 2 n borders out of size + 1 gaps: perhaps the last, which no token stands behind, and the rest before tokens.
        last = found.first(draw("last")) * (body.size + 1) < 2 * spans
        inside = (slots >= body.start) & (slots < body.start + body.size)
        rank = jax.vmap(ranks)(draw("borders"), jnp.where(inside, body.start, slots))
        border = inside & (rank < 2 * spans - last)
        hidden = inside & (found.before(border.astype(jnp.int32)) + border) % 2 == 1
        ends = hidden & ~jnp.pad(hidden[:, 1:] & (found.start[:, 1:] == found.start[:, :-1]), ((0, 0), (0, 1)))
        return Noise(hidden, ends, jnp.full(hidden.shape, -1))

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        trunk, length = models.trunk, batch["tokens"].shape[1]
        vocabulary = trunk.vocabulary
        rows = trunk.table.get_value().shape[0]
        ids = extra(vocabulary, rows, modes=0, sentinels=self.most, owner="CM3")
        noise = self.noise(batch, vocabulary, key=key)
        side, _ = behind(
            batch, noise, first_sentinel=ids.first, end=vocabulary.eos, pad=vocabulary.pad, width=self.room(length)
        )
        out = trunk(side.tokens, segments=side.segments, positions=side.positions, mask=Causal(), keys=key("dropout"))
        targets, weight = shifted(side._asdict())
        # A sentinel stands where nothing in the text says that it must.
        weight = weight * (targets < ids.first)
        loss, accuracy = self.penalty(replace(trunk.scores(out.hidden), size=ids.end), targets, weight)
        moved = metric(noise.hidden.sum(), (batch["segments"] > 0).sum())
        return Loss({"cm3": loss, "accuracy": accuracy, "moved": moved})
