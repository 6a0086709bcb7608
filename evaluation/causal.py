"""Causal perplexity of held-out text."""

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
    call_of,
    divisible,
    named,
    opened,
    prepare,
    ratio,
    summed,
)
from models.masks import Causal
from objectives.cross_entropy import cross_entropy
from objectives.token_loss import shifted
from partitioning import Placement
from partitioning.ranges import Range, check_fields

Count = Annotated[int, Range(1, 1 << 30)]


@dataclass(frozen=True, kw_only=True)
class CausalPerplexity:
    """Bits per token and per byte of a model that reads from left to right.

    bits = -sum_t log2 p(x_t | x_<t), over every token but the `bos` that opens a document, `eos` included.

    Packed documents do not see each other. A document longer than a row is cut, and each piece is a text of its own: its
    first token is predicted from a lone `bos`, so that every token counts once. Bytes are those of the text, so `eos` has
    none.

    Args:
      data: held-out text; sources of a mixture are each read once.
      length, batch_size: tokens in a row, and rows judged at once.
      most_rows: rows of each source at most; None for all.
      name: what the figures' names begin with.

    Source: "Language Models are Unsupervised Multitask Learners", Radford et al., 2019, for windows of a fixed length.
    Differs: windows do not overlap.
    """

    data: Any
    length: Count = 128
    batch_size: Count = 64
    most_rows: Count | None = None
    name: str = "causal"

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

        def score(arrays: Any, batch: Any) -> Rows:
            own = models(**arrays)
            trunk = own.trunk
            bos = trunk.vocabulary.bos
            tokens, segments, positions = batch["tokens"], batch["segments"], batch["positions"]
            hidden = trunk(tokens, segments=segments, positions=positions, mask=Causal()).hidden
            targets, weight = shifted({"tokens": tokens, "segments": segments})
            inner = cross_entropy(trunk.scores(hidden), targets, weight)

            # A lone `bos`, the same in every row; its loss at every token that opens a piece and is not `bos` itself.
            lone = jnp.full_like(tokens[:, :1], bos)
            opening = trunk(lone, segments=jnp.ones_like(lone), positions=jnp.zeros_like(lone), mask=Causal()).hidden
            opens = ((positions == 0) & (segments > 0) & (tokens != bos)).astype(jnp.float32)
            logits = jax.nn.log_softmax(trunk.scores(opening[:, 0]).logits(), axis=-1)
            first = -jnp.take_along_axis(logits, tokens, axis=1)

            rows = {
                "nats": (inner.each * weight).sum(1) + (first * opens).sum(1),
                "tokens": weight.sum(1) + opens.sum(1),
                "bytes": (sizes[targets] * weight).sum(1) + (sizes[tokens] * opens).sum(1),
            }
            return rows, call_of(own, "trunk")

        jitted = jax.jit(score, out_shardings=placement.replicated)

        def judge(arrays: Any) -> Figures:
            found, loads, rows = summed(jitted, arrays, texts)
            figures = bits(found["nats"], found["tokens"], found["bytes"])
            figures["perplexity"] = math.exp(found["nats"] / found["tokens"]) if found["tokens"] else math.nan
            examples = {"bits_per_token": ratio(rows, "nats", "tokens") / math.log(2)}
            return named(self.name, figures, loads, examples)

        return judge
