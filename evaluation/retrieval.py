"""Retrieval: find documents by the vectors of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data.example_rows import text_batch
from data.retrieval import Retrieval as Collection
from data.retrieval import python_search
from evaluation.ndcg import ndcg
from evaluation.reading import Build, Figures, Judge, divisible, named
from evaluation.search import top
from models.pooling import Pooling
from objectives.embedding import embed
from partitioning import Placement, UserError
from partitioning.ranges import Range, check_fields

Count = Annotated[int, Range(1, 1 << 30)]
FIELDS = ("tokens", "segments", "positions")


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """nDCG@k of exact search with the pooled unit vectors of a tree.

    By default on `python_search`: find a function of the standard library by the first sentence of its docstring.

    Args:
      folder: a collection in the BEIR layout; None for `python_search`.
      split: of the collection.
      length: tokens of a text; the rest is cut.
      batch_size: texts embedded at once.
      begin, end: the special before and after each text, as the training data had them, or None.
      pooling: from states to a vector.
      tree: which tree embeds.
      route: the domain of all texts, for `models.DomainRouter`.
      k: the depth.
      name: what the figures' names begin with.

    Source: "BEIR", Thakur et al., 2021.
    Differs: nothing known.
    """

    folder: str | None = None
    split: str = "validation"
    length: Count = 128
    batch_size: Count = 64
    begin: str | None = "bos"
    end: str | None = "eos"
    pooling: Pooling = "mean"
    tree: str = "trunk"
    route: Annotated[int, Range(0, 1 << 30)] | None = None
    k: Count = 10
    name: str = "retrieval"

    def __post_init__(self):
        check_fields(self)

    def prepare(self, *, overwrite: bool = False, report: Callable[[str], None] = lambda line: None) -> list[str]:
        """Nothing to prepare: a collection is tokenised when it is searched."""
        return []

    @property
    def figures(self) -> tuple[str, ...]:
        """See `evaluation.reading.Evaluator`."""
        return (f"{self.name}/ndcg@{self.k}",)

    def open(self, *, models: Build, placement: Placement, tokenizer: Any) -> Judge:
        """See `evaluation.reading.Evaluator`."""
        collection = python_search(self.split) if self.folder is None else Collection.load(self.folder, self.split)
        if not collection.queries:
            raise UserError(f"{self.folder or 'python_search'}: no query has a judged document in split {self.split!r}")
        rows = divisible(self.batch_size, placement)

        def vectors(arrays: Any, batch: Any) -> jax.Array:
            tree = models(**arrays)[self.tree]
            texts = {f"text/{name}": value for name, value in batch.items()}
            domain = {} if self.route is None else {"source": jnp.full((rows,), self.route, jnp.int32)}
            return embed(tree, texts | domain, "text", None, self.pooling)

        jitted = jax.jit(vectors, out_shardings=placement.replicated)

        def encode(arrays: Any, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
            found = []
            with placement.scope():
                for start in range(0, len(texts), rows):
                    part = list(texts[start : start + rows])
                    padded = [*part, *[""] * (rows - len(part))]
                    batch = text_batch(padded, tokenizer, length=self.length, begin=self.begin, end=self.end)
                    # Every host has every text; each device takes its own rows of it.
                    put = {
                        name: jax.make_array_from_callback(
                            batch[name].shape,
                            placement.rows(batch[name].shape, f"a text's {name!r}"),
                            batch[name].__getitem__,
                        )
                        for name in FIELDS
                    }
                    found.append(np.asarray(jitted(arrays, put))[: len(part)])
            return np.concatenate(found)

        ids, queries = list(collection.corpus), list(collection.queries)

        def judge(arrays: Any) -> Figures:
            documents = encode(arrays, [collection.corpus[i] for i in ids])
            asked = encode(arrays, [collection.queries[q] for q in queries])
            _, numbers = top(asked, documents, self.k)
            gains = [
                ndcg([ids[n] for n in row], collection.qrels[query], self.k)
                for query, row in zip(queries, numbers, strict=True)
            ]
            measure = f"ndcg@{self.k}"
            return named(self.name, {measure: float(np.mean(gains))}, examples={measure: np.array(gains)})

        return judge
