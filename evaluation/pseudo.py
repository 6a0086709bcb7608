"""Pseudo-perplexity: every token of held-out text, each hidden alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from evaluation.reading import (
    Build,
    Figures,
    Judge,
    Rows,
    Texts,
    bits,
    divisible,
    named,
    opened,
    prepare,
    ratio,
    summed,
)
from models.masks import Bidirectional
from objectives.cross_entropy import cross_entropy
from partitioning import Placement
from partitioning.ranges import Range, check_fields

Count = Annotated[int, Range(1, 1 << 30)]


@dataclass(frozen=True, kw_only=True)
class PseudoPerplexity:
    """The exact pseudo-log-likelihood of held-out text.

    PLL = sum_t log p(x_t | x_1 .. x_{t-1}, [MASK], x_{t+1} .. x_n);  PPPL = exp(-PLL / #t).

    Specials are never hidden and not counted. A text costs as many forward passes as it has tokens: use `most_rows`.

    Args:
      data: held-out text; sources of a mixture are each read once.
      length, batch_size: tokens in a row, and rows judged at once.
      at_once: positions of a row that are hidden in one pass, each in a copy of its own.
      most_rows: rows of each source at most; None for all.
      name: what the figures' names begin with.

    Source: "Masked Language Model Scoring", Salazar et al., 2020.
    Differs: nothing known.
    """

    data: Any
    length: Count = 128
    batch_size: Count = 8
    at_once: Count = 16
    most_rows: Count | None = 64
    name: str = "pseudo"

    def __post_init__(self):
        check_fields(self)

    def prepare(self, *, overwrite: bool = False, report: Callable[[str], None] = lambda line: None) -> list[str]:
        """Prepares the data where it is not."""
        return prepare(self.data, overwrite=overwrite, report=report)

    @property
    def figures(self) -> tuple[str, ...]:
        """See `evaluation.reading.Evaluator`."""
        return tuple(f"{self.name}/{kind}" for kind in ("bits_per_token", "bits_per_byte", "perplexity"))

    def open(self, *, models: Build, placement: Placement, tokenizer: Any) -> Judge:
        """See `evaluation.reading.Evaluator`."""
        texts = Texts(
            opened(self.data, tokenizer), divisible(self.batch_size, placement), self.length, placement, self.most_rows
        )
        sizes = jnp.asarray(tokenizer.token_bytes)
        width = min(self.at_once, self.length)
        starts = jnp.arange(0, self.length, width)

        def score(arrays: Any, batch: Any) -> Rows:
            trunk = models(**arrays).trunk
            tokens = batch["tokens"]
            counted = ((batch["segments"] > 0) & ~trunk.vocabulary.is_special(tokens)).astype(jnp.float32)
            copied = lambda x: jnp.repeat(x, width, axis=0)
            segments, positions = copied(batch["segments"]), copied(batch["positions"])

            def some(nats: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
                """Adds the losses at the positions from `start` on."""
                at = start + jnp.arange(width)
                # The last stretch may reach past the row: those copies hide nothing and count nothing.
                inside = (at < self.length).astype(jnp.float32)
                at = jnp.minimum(at, self.length - 1)
                hide = (jnp.arange(self.length) == at[:, None])[None] & (inside > 0)[None, :, None]
                seen = jnp.where(hide, trunk.vocabulary.mask, tokens[:, None]).reshape(-1, self.length)
                own = jnp.tile(at, tokens.shape[0])[:, None]
                out = trunk(seen, segments=segments, positions=positions, mask=Bidirectional(), at=own)
                weight = counted[:, at] * inside
                hidden = out.hidden.reshape(*weight.shape, -1)
                found = cross_entropy(trunk.scores(hidden), tokens[:, at], weight)
                return nats + (found.each * weight).sum(1), None

            nats, _ = jax.lax.scan(some, jnp.zeros(tokens.shape[0], jnp.float32), starts)
            # Copies that hide nothing are rows like others: whom their tokens choose is no figure of the text.
            return {"nats": nats, "tokens": counted.sum(1), "bytes": (sizes[tokens] * counted).sum(1)}, {}

        jitted = jax.jit(score, out_shardings=placement.replicated)

        def judge(arrays: Any) -> Figures:
            found, _, rows = summed(jitted, arrays, texts)
            figures = bits(found["nats"], found["tokens"], found["bytes"])
            figures["perplexity"] = math.exp(found["nats"] / found["tokens"]) if found["tokens"] else math.nan
            examples = {"bits_per_token": ratio(rows, "nats", "tokens") / math.log(2)}
            return named(self.name, figures, examples=examples)

        return judge
