"""Mixtures: which source each row of a run comes from, and how many rows each source has given before it.

Weights become whole slots out of 1024. Within a span of constant weights row m takes slot `order[m % 1024]` of a seeded
permutation, so every 1024 rows hold exactly each source's slots, and the rows that a source gave before row m follow
from m // 1024 and one prefix table: random access costs the same at row 10 and at row 10^12. The control log changes
weights at a declared row; a new span begins there, and what each source has given so far is carried on. Weights that are
schedules are entries of that log too, which follow from the config (`MixtureReader.planned`).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from data.control import ControlEntry
from data.epochs import Recent
from data.reader import Cached, SplitReader, global_rows
from data.shuffle import derive, permutation
from data.text_rows import INT, Batch, Shapes
from partitioning.errors import UserError

SLOTS = 1024
CONTROL_KEY = "mixture"

# A weight: a number, or a schedule of the run's step (optax's are such).
Weight = float | Callable[[Any], Any]


class Opens(Protocol):
    """A description of one split that opens as a reader: `Cached` or `Records`."""

    def open(self) -> SplitReader:
        """Open it."""


def slots_of(weights: Mapping[str, float], names: Sequence[str]) -> Int[np.ndarray, " sources"]:
    """Whole slots out of 1024 by largest remainders; a weight above 0 gets one at least.

    Errors: UserError naming the source when a weight is negative, not finite, missing or of an unknown source, or when
    all are 0.
    """
    for name in sorted(weights.keys() ^ set(names)):
        what = "has no weight" if name in names else "is not a source"
        raise UserError(f"mixture: {name!r} {what}; the sources are {', '.join(names)}")
    given = np.array([float(weights[name]) for name in names])
    for name, weight in zip(names, given.tolist(), strict=True):
        if not np.isfinite(weight) or weight < 0:
            raise UserError(f"mixture: weight {weight} of {name!r}: a number of at least 0 is wanted")
    if not given.sum():
        raise UserError("mixture: every weight is 0; one above 0 is wanted")
    exact = SLOTS * given / given.sum()
    slots = np.maximum(np.floor(exact), given > 0).astype(np.int64)
    for index in np.argsort(-(exact - slots), kind="stable")[: max(0, SLOTS - slots.sum())]:
        slots[index] += 1
    while slots.sum() > SLOTS:  # only when tiny weights were raised to one slot
        slots[np.argmax(slots)] -= 1
    return slots


def scheduled(weights: Mapping[str, Weight], steps: int) -> list[tuple[int, dict[str, float]]]:
    """The weights of step 0, and of each later step that changes a source's slots.

    Arguments:
        weights: by source.
        steps: of the run.

    Errors: UserError naming step and source when a weight leaves its range.
    """
    names = list(weights)
    fixed = all(not callable(weight) for weight in weights.values())
    table = np.stack([_over(weight, 1 if fixed else steps) for weight in weights.values()], axis=1)
    out: list[tuple[int, dict[str, float]]] = []
    last = None
    for step in [0, *(np.flatnonzero((table[1:] != table[:-1]).any(1)) + 1).tolist()]:
        now = dict(zip(names, table[step].tolist(), strict=True))
        try:
            slots = slots_of(now, names).tolist()
        except UserError as error:
            raise UserError(f"{error} (at step {step})" if not fixed else str(error)) from None
        if slots != last:
            out.append((step, now))
            last = slots
    return out


def _over(weight: Weight, steps: int) -> Float[np.ndarray, " steps"]:
    if not callable(weight):
        return np.full(steps, float(weight))
    import jax

    return np.broadcast_to(np.asarray(jax.vmap(weight)(jax.numpy.arange(steps)), np.float64), (steps,))


@dataclass(frozen=True)
class Span:
    """Rows from `first` on, under constant weights; `given` is what each source had given before."""

    first: int
    order: Int[np.ndarray, " slots"]
    given: Int[np.ndarray, " sources"]
    before: Int[np.ndarray, "slots_and_1 sources"]

    def counts(self, row: int) -> Int[np.ndarray, " sources"]:
        """Rows that each source gave before row `row` of the run."""
        cycles, rest = divmod(row - self.first, SLOTS)
        return self.given + cycles * self.before[-1].astype(np.int64) + self.before[rest]


class MixtureReader:
    """A reader over several; a batch also says where each row is from: `source [B] i32`, in the order of the names."""

    def __init__(self, readers: Mapping[str, SplitReader], weights: Mapping[str, Weight]):
        self.names = list(readers)
        self._readers = list(readers.values())
        self._given = dict(weights)
        self.weights = scheduled(weights, 1)[0][1]
        slots_of(self.weights, self.names)
        first = self._readers[0]
        self.tokenizer = first.tokenizer
        self.vocabulary, self.specials = first.vocabulary, first.specials
        for name, reader in zip(self.names, self._readers, strict=True):
            if reader.tokenizer.identity != first.tokenizer.identity:
                raise UserError(
                    f"mixture: {name!r} was tokenised with {reader.tokenizer.identity[:12]}, "
                    f"{self.names[0]!r} with {first.tokenizer.identity[:12]}; prepare both with one tokenizer"
                )
            if reader.spec(batch_size=1, length=8) != first.spec(batch_size=1, length=8):
                raise UserError(f"mixture: {name!r} gives other arrays than {self.names[0]!r}; the fields must agree")
        self._spans: Recent[list[Span]] = Recent(8)
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """See `Reader`."""
        sources = {name: reader.identity() for name, reader in zip(self.names, self._readers, strict=True)}
        return {"mixture": sources, "weights": self.weights}

    def frequencies(self) -> Float[np.ndarray, " V"]:
        """See `Reader`: those of the sources, by their weights at the start. Weights are shares of rows, which are of one length."""
        shares = np.array([self.weights[name] for name in self.names])
        each = np.stack([reader.frequencies() for reader in self._readers])
        return (shares / shares.sum()) @ each

    def spec(self, *, batch_size: int, length: int) -> Shapes:
        """See `Reader`."""
        return {**self._readers[0].spec(batch_size=batch_size, length=length), "source": ((batch_size,), INT)}

    def rows(self, *, length: int) -> int:
        """Rows of one epoch of every source together."""
        return sum(reader.rows(length=length) for reader in self._readers)

    def planned(self, steps: int, row: Callable[[int], int]) -> tuple[ControlEntry, ...]:
        """See `Reader`: the steps at which schedules change a source's slots."""
        changes = scheduled(self._given, steps)[1:]
        return tuple(ControlEntry(step, {CONTROL_KEY: weights}, row(step)) for step, weights in changes)

    def epochs(self, row: int, *, length: int, seed: int, control: Sequence[ControlEntry] = ()) -> dict[str, float]:
        """See `Reader`: `epoch/<source>` of each source."""
        spans = self.spans(seed=seed, control=control)
        counts = next(span for span in reversed(spans) if span.first <= row).counts(row)
        given = zip(self.names, self._readers, counts.tolist(), strict=True)
        return {f"epoch/{name}": count / reader.rows(length=length) for name, reader, count in given}

    def _plan(self, seed: int, changes: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]) -> list[Span]:
        spans: list[Span] = []
        for first, weights in ((0, tuple(self.weights.items())), *changes):
            slots = slots_of(dict(weights), self.names)
            seeded = [seed & 0xFFFFFFFF, seed >> 32, 4, len(spans)]
            order = np.repeat(np.arange(len(slots)), slots)[permutation(seeded, SLOTS)]
            # Small types: a slow schedule has a thousand spans.
            order = order.astype(np.int16)
            before = np.zeros((SLOTS + 1, len(slots)), np.int16)
            np.cumsum(order[:, None] == np.arange(len(slots)), axis=0, out=before[1:])
            given = spans[-1].counts(first) if spans else np.zeros(len(slots), np.int64)
            spans.append(Span(first, order, given, before))
        return spans

    def spans(
        self, *, seed: int, control: Sequence[ControlEntry] = (), start: int = 0, batch_size: int = 1
    ) -> list[Span]:
        """The spans of constant weights under a control log.

        Errors: UserError when entries are not in the order in which they take effect, or name unknown sources.
        """
        changes: list[tuple[int, tuple[tuple[str, float], ...]]] = []
        for entry in control:
            if CONTROL_KEY not in entry.values:
                continue
            row = entry.row if entry.row is not None else start + entry.step * batch_size
            if row < (changes[-1][0] if changes else 0):
                raise UserError(
                    f"control log: the mixture entry for step {entry.step} takes effect before the one above it"
                )
            changes.append((row, tuple((n, float(w)) for n, w in entry.values[CONTROL_KEY].items())))
        fixed = tuple(changes)
        with self._lock:
            return self._spans.get((seed, fixed), self._plan, seed, fixed)

    def batch(
        self,
        step: int,
        *,
        batch_size: int,
        length: int,
        seed: int,
        start: int = 0,
        host: int = 0,
        hosts: int = 1,
        control: Sequence[ControlEntry] = (),
    ) -> Batch:
        """See `Reader`; control entries under `mixture` set new weights: `{"mixture": {"docs": 0.3, "code": 0.7}}`."""
        rows, row = global_rows(step, batch_size=batch_size, start=start, host=host, hosts=hosts)
        spans = self.spans(seed=seed, control=control, start=start, batch_size=batch_size)
        source, number = assigned(spans, rows)
        out = {
            name: np.zeros((len(rows), *s[1:]), t) for name, (s, t) in self.spec(batch_size=1, length=length).items()
        }
        for index, (name, reader) in enumerate(zip(self.names, self._readers, strict=True)):
            mine = np.flatnonzero(source == index)
            if len(mine):
                for key, array in reader.take(number[mine], length=length, seed=derive(seed, name)).items():
                    out[key][mine] = array
        return {**out, "row": row, "source": source.astype(np.int32)}


def assigned(spans: Sequence[Span], rows: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """The source of each row, and which of that source's rows it is."""
    source, number = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    which = np.searchsorted([span.first for span in spans], rows, side="right") - 1
    for index in np.unique(which).tolist():
        span, at = spans[index], np.flatnonzero(which == index)
        cycles, rest = np.divmod(rows[at] - span.first, SLOTS)
        source[at] = span.order[rest]
        number[at] = (
            span.given[source[at]]
            + cycles * span.before[-1][source[at]].astype(np.int64)
            + span.before[rest, source[at]]
        )
    return source, number


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources in one batch, row by row, in given shares.

    Arguments:
        sources: name -> `Cached` or `Records`; all with one tokenizer and the same fields.
        weights: name -> share of rows, a number or a schedule of the run's step; they need not sum to 1. Shares are
            rounded to 1/1024. A controller may set them instead where none is a schedule.

    Errors: on opening, UserError naming the source whose weight, tokenizer or fields do not fit.
    """

    sources: Mapping[str, Opens]
    weights: Mapping[str, Weight]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("mixture: no sources; at least one is wanted")
        first = {name: weight for name, weight in self.weights.items() if not callable(weight)}
        named = {name: first.get(name, 1.0) for name in self.weights}
        slots_of(named, list(self.sources))

    def prepare(
        self, *, overwrite: bool = False, processes: int = 1, report: Callable[[str], None] = lambda line: None
    ) -> list[str]:
        """Prepare every source that has a cache, and return their folders."""
        cached = [source for source in self.sources.values() if isinstance(source, Cached)]
        return [source.prepare(overwrite=overwrite, processes=processes, report=report) for source in cached]

    def open(self) -> MixtureReader:
        """Open every source."""
        readers = {}
        for name, source in self.sources.items():
            reader = source.open()
            if not isinstance(reader, SplitReader):
                raise UserError(f"mixture: {name!r} is itself a mixture; list its sources here instead")
            readers[name] = reader
        return MixtureReader(readers, self.weights)
