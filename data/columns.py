"""Ragged columns: many sequences of different lengths held as one flat array of values and the counts that divide it.

A column has a kind, read off the first record: `text` (one sequence of ids an example), `texts` (a list of sequences,
one more level of counts), `number` and `numbers` (float32).
"""

import io
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Protocol

import numpy as np
from jaxtyping import Int, Shaped

from data.sources import Record
from data.tokenizers import Tokenizer
from partitioning.errors import UserError

BATCH = 256
# The kinds whose values are ids.
TEXTS = ("text", "texts")


def offsets(counts: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N_and_1"]:
    """Where each sequence begins, and the end of the last."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


def ragged_index(starts: Int[np.ndarray, " N"], sizes: Int[np.ndarray, " N"]) -> Int[np.ndarray, " total"]:
    """The indices `starts[0], starts[0] + 1, .., starts[1], ..` of all sequences, one behind the other."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - sizes), sizes)


def token_type(vocabulary: int) -> np.dtype:
    """The narrowest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Column:
    """One column of a split.

    Arguments:
        kind: `text`, `texts`, `number` or `numbers`.
        counts: items of each example: sequences for `texts`, values otherwise.
        sizes: for `texts`, the values of each sequence; None otherwise.
        values: all values.
    """

    kind: str
    counts: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, " sequences"] | None
    values: Shaped[np.ndarray, " values"]


class Split(Protocol):
    """The examples of one split, wherever they are kept."""

    @property
    def examples(self) -> int:
        """The number of examples."""

    @property
    def kinds(self) -> Mapping[str, str]:
        """Column name -> kind."""

    @property
    def largest(self) -> Mapping[str, int]:
        """Column name -> the items of the example that has most."""

    def bounds(self, name: str) -> Int[np.ndarray, " N_and_1"]:
        """Where the items of each example begin."""

    def inner(self, name: str) -> Int[np.ndarray, " sequences_and_1"]:
        """For `texts`, where the values of each sequence begin."""

    def counts(self, name: str, vocabulary: int) -> Int[np.ndarray, " V"]:
        """For `text` and `texts`, how often each id occurs."""

    def values(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " values"]:
        """A contiguous range of values."""


class MemorySplit:
    """A split held in memory."""

    def __init__(self, columns: Mapping[str, Column]):
        self._columns = columns
        self.kinds = {name: column.kind for name, column in columns.items()}
        self.examples = len(next(iter(columns.values())).counts)
        self.largest = {name: int(column.counts.max(initial=0)) for name, column in columns.items()}
        self._bounds = {name: offsets(column.counts) for name, column in columns.items()}
        self._inner = {n: offsets(c.sizes) for n, c in columns.items() if c.sizes is not None}

    def bounds(self, name: str) -> Int[np.ndarray, " N_and_1"]:
        """See `Split`."""
        return self._bounds[name]

    def inner(self, name: str) -> Int[np.ndarray, " sequences_and_1"]:
        """See `Split`."""
        return self._inner[name]

    def counts(self, name: str, vocabulary: int) -> Int[np.ndarray, " V"]:
        """See `Split`."""
        return np.bincount(self._columns[name].values, minlength=vocabulary)

    def values(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " values"]:
        """See `Split`."""
        return self._columns[name].values[start:stop]


def kind_of(value: Any) -> str | None:
    """The kind of a record's value, or None when it has none."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, list | tuple) and value:
        kinds = {kind_of(item) for item in value}
        if kinds == {"text"}:
            return "texts"
        if kinds == {"number"}:
            return "numbers"
    return None


@dataclass(frozen=True)
class Encoded:
    """Some records, tokenised.

    Arguments:
        examples: how many.
        text_bytes: UTF-8 bytes of all their texts.
        columns: name -> (counts, sizes, values) as in `Column`.
    """

    examples: int
    text_bytes: int
    columns: Mapping[str, tuple[np.ndarray, np.ndarray | None, np.ndarray]]


def encode(tokenizer: Tokenizer, kinds: Mapping[str, str], records: Sequence[Record]) -> Encoded:
    """Tokenise records whose fields are of these kinds."""
    text_bytes = 0
    columns: dict[str, tuple[np.ndarray, np.ndarray | None, np.ndarray]] = {}
    for name, kind in kinds.items():
        values: list[Any] = [record[name] for record in records]
        counts, sizes = np.ones(len(values), np.int64), None
        if kind in ("texts", "numbers"):
            counts = np.array([len(value) for value in values], np.int64)
            values = [item for value in values for item in value]
        if kind in ("number", "numbers"):
            columns[name] = counts, None, np.asarray(values, np.float32)
            continue
        found = tokenizer.encode_many(values)
        each = np.array([len(ids) for ids in found], np.int64)
        counts, sizes = (each, None) if kind == "text" else (counts, each)
        flat = np.concatenate(found) if found else np.zeros(0, np.int32)
        text_bytes += int(tokenizer.token_bytes[flat].sum())
        columns[name] = counts, sizes, flat.astype(token_type(tokenizer.vocabulary))
    return Encoded(len(records), text_bytes, columns)


class Tokenized:
    """Collects tokenised records into columns, writing values to the files that `open_values(name)` gives.

    Arguments:
        tokenizer: encodes the texts.
        where: what the records are, for errors ("python_docs, train").
        open_values: gives a binary file for the values of a column; memory by default.
    """

    def __init__(self, tokenizer: Tokenizer, where: str, open_values: Callable[[str], BinaryIO] | None = None):
        self.tokenizer = tokenizer
        self.where = where
        self._open = open_values or (lambda name: io.BytesIO())
        self._checked = 0
        self.kinds: dict[str, str] = {}
        self.files: dict[str, BinaryIO] = {}
        self.counts: dict[str, array] = {}
        self.sizes: dict[str, array] = {}
        self.examples = 0
        self.bytes = 0  # UTF-8 bytes of all texts

    def dtype(self, name: str) -> np.dtype:
        """The type of a column's values."""
        return token_type(self.tokenizer.vocabulary) if self.kinds[name] in TEXTS else np.dtype(np.float32)

    def add(self, records: Iterable[Record]) -> None:
        """Check, tokenise and append."""
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            self.check(batch)
            self.append(encode(self.tokenizer, self.kinds, batch))

    def check(self, records: Sequence[Record]) -> None:
        """Look at the next records before they are tokenised; the first one of all sets the fields and their kinds.

        Errors: UserError naming the record whose fields or kinds differ from those of the first.
        """
        for record in records:
            if not self.kinds:
                self._begin(record)
            self._check(record, self._checked)
            self._checked += 1

    def append(self, encoded: Encoded) -> None:
        """Append records that were checked, in their order."""
        for name, (counts, sizes, values) in encoded.columns.items():
            self.counts[name].frombytes(counts.tobytes())
            if sizes is not None:
                self.sizes[name].frombytes(sizes.tobytes())
            self.files[name].write(values.tobytes())
        self.examples += encoded.examples
        self.bytes += encoded.text_bytes

    def _begin(self, record: Record) -> None:
        for name, value in record.items():
            kind = kind_of(value)
            if kind is None:
                raise UserError(
                    f"{self.where}, record 0: field {name!r} is neither text, a number, nor a list of one of them"
                )
            self.kinds[name] = kind
            self.files[name] = self._open(name)
            self.counts[name], self.sizes[name] = array("q"), array("q")
        if not self.kinds:
            raise UserError(f"{self.where}, record 0: it has no field")

    def _check(self, record: Record, number: int) -> None:
        if record.keys() != self.kinds.keys():
            raise UserError(
                f"{self.where}, record {number}: its fields are {', '.join(sorted(record)) or 'none'}, "
                f"record 0 has {', '.join(sorted(self.kinds))}"
            )
        for name, kind in self.kinds.items():
            if kind_of(record[name]) != kind and not (kind in ("texts", "numbers") and record[name] in ([], ())):
                raise UserError(f"{self.where}, record {number}: field {name!r} is not of kind {kind!r} as in record 0")

    def columns(self, values: Callable[[str], np.ndarray] | None = None) -> dict[str, Column]:
        """The columns; `values(name)` gives back the values that were written, which is memory by default."""
        if not self.examples:
            raise UserError(f"{self.where}: there is no record")

        def held(name: str) -> np.ndarray:
            file = self.files[name]
            assert isinstance(file, io.BytesIO)
            return np.frombuffer(file.getvalue(), self.dtype(name))

        return {
            name: Column(
                kind,
                np.array(self.counts[name], np.int64),
                np.array(self.sizes[name], np.int64) if kind == "texts" else None,
                (values or held)(name),
            )
            for name, kind in self.kinds.items()
        }


def reordered(
    column: Column, order: Int[np.ndarray, " N"], group: int = 1 << 20
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " sequences"] | None, Iterator[Shaped[np.ndarray, " _"]]]:
    """A column with its examples in another order: counts, sizes, and the values in groups of about `group`."""
    counts = column.counts[order]
    starts = offsets(column.counts)[:-1][order]
    sizes = None
    items = counts
    if column.sizes is not None:
        sequences = ragged_index(starts, counts)
        starts = offsets(column.sizes)[:-1][sequences]
        sizes = items = column.sizes[sequences]

    def groups() -> Iterator[np.ndarray]:
        ends = np.cumsum(items)
        at = 0
        while at < len(items):
            done = int(ends[at - 1]) if at else 0
            stop = max(at + 1, int(np.searchsorted(ends, done + group, side="right")))
            yield column.values[ragged_index(starts[at:stop], items[at:stop])]
            at = stop

    return counts, sizes, groups()
