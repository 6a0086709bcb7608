"""Masked likelihood: hide a fixed sample of held-out tokens and ask for them."""

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
from evaluation.unigram import count
from models.masks import Bidirectional
from objectives.cross_entropy import cross_entropy
from objectives.draws import draws
from objectives.replace import Replace
from objectives.select import RandomTokens
from partitioning import Placement
from partitioning.ranges import Range, check_fields

Count = Annotated[int, Range(1, 1 << 30)]


@dataclass(frozen=True, kw_only=True)
class MaskedLikelihood:
    """Accuracy and bits per token on hidden tokens of held-out text.

    In every row exactly round(rate * n) of its n ordinary tokens become the mask token; which ones depends on `seed` and
    on the row's number only, so figures of different models, batch sizes and meshes compare.

    bits per token = -sum_i log2 p(x_i | x~) / #i;  accuracy = share of i where x_i has the highest score.

    With `baseline`, the unigram model of that data (add-one smoothed) is judged on the same tokens: its figures end in
    `/unigram`.

    Args:
      data: held-out text, `data.Cached`, `data.Records` or a mixture, whose sources are each read once.
      baseline: the training text; None for no baseline.
      rate: share of the tokens that is hidden.
      length, batch_size: tokens in a row, and rows judged at once.
      most_rows: rows of each source at most; None for all.
      seed: of the choice.
      before: whether a hidden token is predicted from the state before it, as `objectives.GPTBert` trains; one that opens a
        document's piece has none and is not counted.
      name: what the figures' names begin with.

    Source: "BERT", Devlin et al., 2019.
    Differs: every hidden token becomes the mask token, none a random one or itself.
    """

    data: Any
    baseline: Any = None
    rate: Annotated[float, Range(0, 1, open="low")] = 0.15
    length: Count = 128
    batch_size: Count = 64
    most_rows: Count | None = None
    seed: Annotated[int, Range(0, (1 << 32) - 1)] = 0
    before: bool = False
    name: str = "masked"

    def __post_init__(self):
        check_fields(self)

    def prepare(self, *, overwrite: bool = False, report: Callable[[str], None] = lambda line: None) -> list[str]:
        """Prepares the data where it is not."""
        return [
            folder
            for data in (self.data, self.baseline)
            for folder in prepare(data, overwrite=overwrite, report=report)
        ]

    @property
    def figures(self) -> tuple[str, ...]:
        """See `evaluation.reading.Evaluator`."""
        kinds = ("accuracy", "bits_per_token", "bits_per_byte")
        ends = ("",) if self.baseline is None else ("", "/unigram")
        return tuple(f"{self.name}/{kind}{end}" for end in ends for kind in kinds)

    def open(self, *, models: Build, placement: Placement, tokenizer: Any) -> Judge:
        """See `evaluation.reading.Evaluator`."""
        rows = divisible(self.batch_size, placement)
        texts = Texts(opened(self.data, tokenizer), rows, self.length, placement, self.most_rows)
        unigram = None if self.baseline is None else count(self.baseline, tokenizer)
        select, replace = RandomTokens(rate=self.rate), Replace(mask=1.0, random=0.0)
        sizes = jnp.asarray(tokenizer.token_bytes)

        def score(arrays: Any, batch: Any) -> Rows:
            own = models(**arrays)
            trunk = own.trunk
            key = draws(jax.random.key(self.seed), 0, batch["row"], rows)
            hide = select(batch, trunk.vocabulary, step=0, key=key)
            seen = replace(batch["tokens"], hide, trunk.vocabulary, key=key)
            segments, positions = batch["segments"], batch["positions"]
            at = hide.positions
            if self.before:
                hide = hide._replace(weight=hide.weight * (hide.gather(positions) > 0))
                at = jnp.maximum(at - 1, 0)
            out = trunk(seen, segments=segments, positions=positions, mask=Bidirectional(), at=at)
            targets = hide.gather(batch["tokens"])
            found = cross_entropy(trunk.scores(out.hidden), targets, hide.weight)
            total = lambda value: (value * hide.weight).sum(1)
            out = {
                "nats": total(found.each),
                "hits": total(found.hit),
                "tokens": hide.weight.sum(1),
                "bytes": total(sizes[targets]),
            }
            if unigram is not None:
                out["unigram nats"] = total(-jnp.asarray(unigram.log_probabilities)[targets])
                out["unigram hits"] = total(targets == unigram.likeliest)
            return out, call_of(own, "trunk")

        jitted = jax.jit(score, out_shardings=placement.replicated)

        def judge(arrays: Any) -> Figures:
            found, loads, rows = summed(jitted, arrays, texts)
            figures: dict[str, float] = {}
            for kind, suffix in (("", ""), ("unigram ", "/unigram")):
                if f"{kind}nats" in found:
                    own = {"accuracy": found[f"{kind}hits"] / max(found["tokens"], 1.0)}
                    own |= bits(found[f"{kind}nats"], found["tokens"], found["bytes"])
                    figures |= {f"{figure}{suffix}": value for figure, value in own.items()}
            examples = {
                "accuracy": ratio(rows, "hits", "tokens"),
                "bits_per_token": ratio(rows, "nats", "tokens") / math.log(2),
            }
            return named(self.name, figures, loads, examples)

        return judge
