"""Two trunks, the second of which reads what the first has made of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from models.heads import Scores
from models.masks import Causal, Mask
from models.trunk import Output, Trunk
from models.vocabulary import Vocabulary
from partitioning import UserError


class EncoderDecoder(nnx.Module):
    """An encoder, and a decoder whose blocks attend to its states; both share the token embeddings and one head.

    Args:
      vocabulary: of the tokens on both sides.
      encoder: makes the first trunk, called with (vocabulary, rngs).
      decoder: makes the second, called with (vocabulary, embeddings=False, rngs); its blocks have cross-attention.
      rngs: where the initial weights come from.

    Source: "Attention Is All You Need", Vaswani et al., 2017.
    Differs: nothing known.
    """

    two_sided = True

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        encoder: Callable[..., Trunk],
        decoder: Callable[..., Trunk],
        rngs: nnx.Rngs,
    ):
        self.vocabulary = vocabulary
        # Which family made it, with which sizes; other layouts go by that.
        self.family: Any = None
        self.encoder = encoder(vocabulary, rngs=rngs)
        self.decoder = decoder(vocabulary, embeddings=False, rngs=rngs)

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.width

    @property
    def table(self) -> Any:
        """The token embeddings."""
        return self.encoder.table

    @property
    def start(self) -> int:
        """What the decoder reads first: the padding token as in T5, or the first token of a text where there is none."""
        return self.vocabulary.pad if self.vocabulary.pad >= 0 else self.vocabulary.bos

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        targets: Int[Array, "B T"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        target_positions: Int[Array, "B T"] | None = None,
        mask: Mask | None = None,
        target_mask: Mask | None = None,
        keys: jax.Array | None = None,
        at: Int[Array, "B K"] | None = None,
    ) -> Output:
        """Reads the tokens, and the targets from left to right beside them.

        Args:
          tokens, segments, positions: what the encoder reads, as in `Trunk`.
          targets, target_segments, target_positions: what the decoder reads; a document's targets see its tokens.
          mask: of the encoder; bidirectional by default.
          target_mask: of the decoder; causal by default.
          keys: one dropout key a row; None for no dropout.
          at: the targets' slots whose states are wanted.

        Returns:
          The decoder's output, with the side terms and tallies of both.

        Raises:
          UserError: there are no targets.
        """
        if targets is None or target_segments is None or target_positions is None:
            raise UserError(
                "an encoder-decoder writes beside what it reads: expected an objective that gives it `targets`, such as "
                "SpanCorruption, MASS or Seq2Seq"
            )
        fold = lambda n: None if keys is None else jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)
        read = self.encoder(tokens, segments=segments, positions=positions, mask=mask, keys=fold(0))
        out = self.decoder(
            embeddings=self.decoder.embed(
                targets, target_positions, segments=target_segments, table=self.table.get_value()
            ),
            segments=target_segments,
            positions=target_positions,
            mask=Causal() if target_mask is None else target_mask,
            memory=read.hidden,
            memory_segments=segments,
            keys=fold(1),
            at=at,
        )
        both = {"encoder": read, "decoder": out}
        sides = {f"{name}/{key}": side for name, o in both.items() for key, side in o.aux.items()}
        tallies = {f"{name}/{key}": tally for name, o in both.items() for key, tally in o.tallies.items()}
        return Output(out.hidden, out.taps, sides, tallies, out.cache)

    def scores(self, hidden: Float[Array, "*B D"]) -> Scores:
        """Scores of the decoder's states over the vocabulary, not multiplied out."""
        return self.encoder.scores(hidden)
