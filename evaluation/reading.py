"""Held-out text read exactly once, in batches of a fixed shape, on any mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Float

from data.mixing import Mixture
from data.reader import Reading
from models.loads import Loads
from models.side import Tally
from partitioning import Placement, UserError

Arrays = dict[str, dict[str, jax.Array]]
Rows = tuple[Mapping[str, jax.Array], Mapping[str, Tally]]
Build = Callable[..., Any]
Each = Mapping[str, Float[np.ndarray, " N"]]


class Figures(dict[str, float | Loads]):
    """Figures by name, and the loads of experts.

    Attributes:
      examples: some of the figures of each example alone, by the same names, in the order of the data.
    """

    examples: Each = MappingProxyType({})


Judge = Callable[[Arrays], Figures]


class Evaluator(Protocol):
    """What a config hands to a run."""

    def open(self, *, models: Build, placement: Placement, tokenizer: Any) -> Judge:
        """Readies the evaluator for one run: reads what it needs and compiles at its first call.

        Args:
          models: the run's modules around (params, frozen, buffers); called inside jit.
          placement: the run's mesh and rules.
          tokenizer: of the run's data.

        Returns:
          A function from `{"params", "frozen", "buffers"}` to figures by name, and to loads of experts.
        """

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of the figures, as far as the description knows them."""


def sources(data: Any) -> list[Any]:
    """The single sources of a data description, each to be read once, in the seeded order of a first epoch.

    Raises:
      UserError: it is neither a `Reading` (`data.Cached`, `data.Records`) nor a mixture of such.
    """
    parts: list[Any] = list(data.sources.values()) if isinstance(data, Mixture) else [data]
    for part in parts:
        if not isinstance(part, Reading):
            raise UserError(
                f"{type(part).__name__} cannot be read once: an evaluator wants data.Cached or data.Records"
            )
    return [replace(part, epochs=1, shuffle=True) for part in parts]


def prepare(data: Any, *, overwrite: bool, report: Callable[[str], None]) -> list[str]:
    """Prepares the caches of a data description, where it has any; returns their folders."""
    if data is None or not hasattr(data, "prepare"):
        return []
    found = data.prepare(overwrite=overwrite, report=report)
    return [found] if isinstance(found, str) else list(found)


def opened(data: Any, tokenizer: Any) -> list[Any]:
    """Readers over the sources.

    Raises:
      UserError: one was tokenised otherwise than the run's data.
    """
    readers = [source.open() for source in sources(data)]
    for reader in readers:
        if reader.tokenizer.identity != tokenizer.identity:
            raise UserError(
                f"an evaluator's data {reader.identity()['task']!r} was tokenised with {reader.tokenizer.identity[:12]}, "
                f"the run's with {tokenizer.identity[:12]}: prepare both with one tokenizer"
            )
    return readers


def divisible(batch_size: int, placement: Placement) -> int:
    """The batch size, rounded up so that it divides over the mesh: figures do not depend on it."""
    ways = math.prod(placement.mesh.shape[axis] for axis in placement.rules.activations["batch"])
    return -(-batch_size // ways) * ways


@dataclass(frozen=True)
class Texts:
    """Every row of some readers, once.

    Args:
      readers: with `epochs=1`, so that rows past the end are padding.
      batch_size: rows in a batch, all devices together.
      length: tokens in a row.
      most_rows: rows of each reader at most; None for all. Rows come in a seeded order, so the first are a random sample.
      placement: where batches go.
    """

    readers: list[Any]
    batch_size: int
    length: int
    placement: Placement
    most_rows: int | None = None

    def host_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This host's share of every batch; `row` numbers the rows of all readers, whatever the batch size."""
        before = 0
        share, shares = self.placement.share
        for reader in self.readers:
            count = reader.rows(length=self.length)
            count = count if self.most_rows is None else min(count, self.most_rows)
            for step in range(-(-count // self.batch_size)):
                batch = reader.batch(
                    step,
                    batch_size=self.batch_size,
                    length=self.length,
                    seed=0,
                    host=share,
                    hosts=shares,
                )
                number = batch["row"] + step * self.batch_size
                # What lies past `most_rows` in the last batch counts no more than padding does.
                past = number >= count
                batch["segments"] = np.where(past[:, None], 0, batch["segments"]).astype(np.int32)
                yield {**batch, "row": (before + number).astype(np.int32)}
            before += count

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        for batch in self.host_batches():
            yield {name: self.put(name, batch[name]) for name in ("tokens", "segments", "positions", "row")}

    def put(self, name: str, value: np.ndarray) -> jax.Array:
        """Places one host's share of a field."""
        return placed(value, self.placement, name)


def placed(value: np.ndarray, placement: Placement, name: str) -> jax.Array:
    """One host's share of an array of rows, on the mesh."""
    shape = (value.shape[0] * placement.share[1], *value.shape[1:])
    sharding = placement.rows(shape, f"an evaluator's field {name!r}")
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    return jax.make_array_from_process_local_data(sharding, value, shape)


def summed(score: Callable[..., Rows], arrays: Arrays, texts: Texts) -> tuple[dict[str, float], Loads, Each]:
    """The sums over all rows of what `score(arrays, batch)` gives for each row, added in float64 on the host, the loads, and
    what was summed, row by row.

    Args:
      score: a jitted function to arrays `[B]` and to the tallies of a call, see `call_of`, that every host can read.
      arrays: parameters, frozen leaves and buffers.
      texts: what is read.
    """
    totals: dict[str, float] = {}
    tallies: dict[str, Any] = {}
    parts: dict[str, list[np.ndarray]] = {}
    with texts.placement.scope():
        before: Any = None
        for batch in texts:
            now = score(arrays, batch)
            if before is not None:
                _add(totals, tallies, parts, before)
            before = now
        if before is not None:
            _add(totals, tallies, parts, before)
    return totals, Loads(tallies), {name: np.concatenate(rows) for name, rows in parts.items()}


def _add(totals: dict[str, float], tallies: dict[str, Any], parts: dict[str, list[np.ndarray]], found: Rows) -> None:
    rows, own = jax.device_get(found)
    for name, value in rows.items():
        wide = np.asarray(value, np.float64)
        totals[name] = totals.get(name, 0.0) + float(wide.sum())
        parts.setdefault(name, []).append(wide)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), own)
    for name, tally in wide.items():
        tallies[name] = jax.tree.map(np.add, tallies[name], tally) if name in tallies else tally


def call_of(models: Any, tree: str) -> dict[str, Tally]:
    """The tallies of a tree's first call, by block."""
    return {name: tally for name, tally in models.tallies.items() if name.startswith(f"{tree}/")}


def named(
    name: str, figures: Mapping[str, float], loads: Loads | None = None, examples: Each = MappingProxyType({})
) -> Figures:
    """An evaluator's figures under its name, the loads where the model has any, and the figures of each example."""
    found = Figures({f"{name}/{key}": value for key, value in figures.items()} | ({name: loads} if loads else {}))
    found.examples = {f"{name}/{key}": value for key, value in examples.items()}
    return found


def ratio(rows: Each, total: str, over: str) -> Float[np.ndarray, N]:
    """total / over of each row that has any of what it is over; what rows are left is the same for all models."""
    counted = rows[over] > 0
    return rows[total][counted] / rows[over][counted]


def bits(nats: float, tokens: float, size: float) -> dict[str, float]:
    """Bits per token and per UTF-8 byte of a sum of losses.

    bits/token = nats / (ln 2 * tokens); bits/byte = nats / (ln 2 * bytes), so the one is the other * bytes / tokens.
    """
    each = nats / math.log(2)
    return {
        "bits_per_token": each / tokens if tokens else math.nan,
        "bits_per_byte": each / size if size else math.nan,
    }
