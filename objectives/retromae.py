"""Masked auto-encoding through a bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.initializers import normal
from models.masks import Bidirectional, Matrix
from models.trunk import Trunk
from models.variables import param
from objectives.base import Companion, Loss
from objectives.masked_lm import Masking
from objectives.select import RandomTokens, Select
from partitioning import UserError
from partitioning.ranges import Range, check_fields


class Bottleneck(nnx.Module):
    """A shallow decoder that sees one state of the encoder beside a few of the tokens."""

    def __init__(self, trunk: Any, make: Callable[..., Any], longest: int, rngs: nnx.Rngs):
        self.inner = make(trunk.vocabulary, width=trunk.width, embeddings=False, rngs=rngs)
        self.places = param(normal(rngs, (longest, trunk.width)), ("length", "embed"))

    def __call__(self, state: Any, embeddings: Any, positions: Any, **call: Any) -> Any:
        """Queries are the document's state plus a place; keys are the other tokens' embeddings and the state."""
        query = state + jnp.take(self.places.get_value().astype(state.dtype), positions, axis=0)
        source = jnp.where((positions == 0)[..., None], state, embeddings)
        return self.inner(embeddings=query, source=source, positions=positions, **call)


@dataclass(frozen=True, kw_only=True)
class RetroMAE(Masking):
    """The encoder fills few masks; a decoder rebuilds the whole text from the first token's state and a random few tokens.

    loss = L_mlm(encoder) + mean_t -log p_dec(x_t | h_first, x_visible(t)).  visible(t): the first place always, t never,
    each other token of the document with probability 1 - unseen.

    Args:
      decoder: makes the decoder's trunk; called with (vocabulary, width, embeddings=False, rngs). Its mixer must not
        rotate.
      longest: places the decoder knows; a row may not be longer.
      unseen: probability that a token is hidden from a query of the decoder.
      select, replace, penalty: the encoder's masked language modelling.

    Source: "RetroMAE", Xiao et al., 2022.
    Differs: random tokens are chosen, not whole words; a packed row has one bottleneck a document.
    """

    decoder: Callable[..., Trunk]
    longest: Annotated[int, Range(1, 1 << 20)] = 512
    unseen: Annotated[float, Range(0, 1)] = 0.5
    select: Select = field(default_factory=lambda: RandomTokens(rate=0.3))

    def __post_init__(self):
        check_fields(self)

    def check(self, *, steps, batch):
        """See `Objective.check`."""
        super().check(steps=steps, batch=batch)
        length = batch["tokens"][0][1]
        if length > self.longest:
            raise UserError(f"RetroMAE.longest = {self.longest}: rows have {length} tokens; set it to at least that")

    def companions(self, trunk, rngs):
        """The decoder."""
        return {"decoder": Companion(Bottleneck(trunk, self.decoder, self.longest, rngs))}

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        tokens, segments, positions = (batch[name] for name in ("tokens", "segments", "positions"))
        trunk, length = models.trunk, batch["tokens"].shape[1]
        picked, seen = self.hide(batch, trunk, step=step, key=key)
        out = trunk(seen, segments=segments, positions=positions, mask=Bidirectional(), keys=key("dropout"))
        mlm, accuracy = self.penalty(trunk.scores(picked.gather(out.hidden)), picked.gather(tokens), picked.weight)

        start = jnp.arange(length) - positions
        state = jnp.take_along_axis(out.hidden, jnp.maximum(start, 0)[..., None], axis=1)
        draw = jax.vmap(lambda k: jax.random.uniform(k, (length, length)))(key("visible"))
        visible = ((draw >= self.unseen) & ~jnp.eye(length, dtype=bool)) | (positions == 0)[:, None, :]
        rebuilt = models.decoder(
            state,
            trunk.embed(tokens, positions, segments=segments),
            positions,
            segments=segments,
            mask=Matrix(visible),
            keys=key("decoder"),
        )
        counted = (segments > 0) & (positions > 0) & ~trunk.vocabulary.is_special(tokens)
        decoded, rebuilt_right = self.penalty(trunk.scores(rebuilt.hidden), tokens, counted.astype(jnp.float32))
        return Loss({"mlm": mlm, "accuracy": accuracy, "decoder": decoded, "decoder_accuracy": rebuilt_right})
