"""Replaced token detection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.feed_forward import ACTIVATIONS
from models.heads import Scores, TiedHead
from models.initializers import normal
from models.trunk import Output, Trunk
from models.variables import param
from objectives.base import Companion, Loss, Term, metric
from objectives.masked_lm import Masking
from objectives.replace import Replace
from partitioning.ranges import Range, check_fields


class Generator(nnx.Module):
    """A small network on the trunk's embeddings: down to its width, a trunk of its own, up again, and a head."""

    def __init__(self, trunk: Any, make: Callable[..., Any], rngs: nnx.Rngs):
        self.inner = make(trunk.vocabulary, embeddings=False, rngs=rngs)
        self.down = param(normal(rngs, (trunk.width, self.inner.width)), ("embed", "mlp"))
        self.up = param(normal(rngs, (self.inner.width, trunk.width)), ("mlp", "embed"))
        self.head = TiedHead(trunk.width, trunk.vocabulary, multiple=trunk.table.get_value().shape[0], rngs=rngs)

    def __call__(self, embeddings: Float[Array, "B S D"], **call: Any) -> Output:
        """The inner trunk's output, its states projected to the width of the embeddings."""
        cast = lambda p: p.get_value().astype(embeddings.dtype)
        out = self.inner(embeddings=embeddings @ cast(self.down), **call)
        return dataclasses.replace(out, hidden=out.hidden @ cast(self.up))

    def scores(self, hidden: Float[Array, "B K D"], table: Float[Array, "V D"]) -> Scores:
        """Scores against the trunk's embeddings."""
        return self.head(hidden, table)


class Discriminator(nnx.Module):
    """From a state to one logit: was this token replaced?"""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.dense = param(normal(rngs, (width, width)), ("embed", "mlp"))
        self.out = param(normal(rngs, (width,)), ("mlp",))

    def __call__(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        """Logits, in float32 at least."""
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        return ACTIVATIONS["gelu"](wide @ self.dense.get_value()) @ self.out.get_value()


@dataclass(frozen=True, kw_only=True)
class Electra(Masking):
    """A small generator fills masks with samples; the trunk tells which tokens are not the original.

    loss = L_mlm(generator) + weight * mean_t BCE(D(x~)_t, [x~_t != x_t]),  x~ sampled from the generator.

    Args:
      generator: makes the generator's trunk; called with (vocabulary, embeddings=False, rngs).
      select, replace, penalty: the generator's masked language modelling.
      weight: of the detection term.

    Source: "ELECTRA", Clark et al., 2020.
    Differs: masked positions are drawn without replacement, where the released code draws with.
    """

    generator: Callable[..., Trunk]
    replace: Replace = field(default_factory=lambda: Replace(mask=0.85, random=0.0))
    weight: Annotated[float, Range(0, 1e6)] = 50.0

    def __post_init__(self):
        check_fields(self)

    def companions(self, trunk, rngs):
        """The generator and the discriminator's head."""
        return {
            "generator": Companion(Generator(trunk, self.generator, rngs)),
            "discriminator": Companion(Discriminator(trunk.width, rngs)),
        }

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        tokens, trunk = batch["tokens"], models.trunk
        place = {"segments": batch["segments"], "positions": batch["positions"]}
        hide, seen = self.hide(batch, trunk, step=step, key=key)
        embedded = trunk.embed(seen, batch["positions"], segments=batch["segments"])
        guess = models.generator(embedded, keys=key("generator/dropout"), at=hide.positions, **place)
        scores = models.generator.scores(guess.hidden, trunk.table.get_value())
        mlm, accuracy = self.penalty(scores, hide.gather(tokens), hide.weight)

        noise = jax.vmap(lambda k: jax.random.gumbel(k, (*hide.positions.shape[1:], scores.size)))(key("sample"))
        sample = jnp.argmax(jax.lax.stop_gradient(scores.logits()) + noise, axis=-1).astype(tokens.dtype)
        filled = hide.scatter(tokens, sample)
        fake = (filled != tokens).astype(jnp.float32)
        out = trunk(filled, keys=key("dropout"), **place)
        logits = models.discriminator(out.hidden)
        real = (batch["segments"] > 0).astype(logits.dtype)
        each = (jax.nn.softplus(logits) - fake * logits) * real
        rtd = Term(each.sum(), real.sum(), self.weight, (each.sum(1), real.sum(1)))
        right = ((logits > 0) == (fake > 0)) * real
        return Loss({"mlm": mlm, "accuracy": accuracy, "rtd": rtd, "rtd_accuracy": metric(right.sum(), real.sum())})
