"""Rows of plain text, several documents packed into each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int

from data import packing
from data.columns import Split, offsets
from data.epochs import Block, Epochs, Recent
from data.packing import Packed
from data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]

INT, BOOL, FLOAT = np.dtype(np.int32), np.dtype(np.bool_), np.dtype(np.float32)


class Rows(Protocol):
    """A numbered, endless supply of rows; row n is a pure function of n, the length and the seed."""

    def shapes(self, length: int) -> Shapes:
        """The shape of each array for one row, and its type."""

    def count(self, length: int) -> int:
        """Rows in one epoch."""

    def take(self, rows: Int[np.ndarray, " B"], *, length: int, seed: int) -> Batch:
        """The rows of these numbers."""


@dataclass(frozen=True)
class Window:
    """The fixed windows of a split: window w holds the examples `w * size` up to `(w + 1) * size`."""

    examples: int
    size: int

    @property
    def count(self) -> int:
        """The number of windows."""
        return -(-self.examples // self.size)

    def range(self, number: int) -> tuple[int, int]:
        """The first example of a window, and the one past its last."""
        return number * self.size, min((number + 1) * self.size, self.examples)


class TextRows:
    """Rows of the column `text`.

    Arguments:
        split: the examples.
        tokenizer: for word starts and padding.
        window: examples in a window.
        begin, end: ids put before and after every document.
        shuffle: False keeps the order of the cache.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        *,
        window: int,
        begin: Sequence[int],
        end: Sequence[int],
        shuffle: bool = True,
    ):
        self._split, self._tokenizer, self._shuffle = split, tokenizer, shuffle
        self._begin, self._end = tuple(begin), tuple(end)
        self._windows = Window(split.examples, window)
        self._bounds = split.bounds("text")
        self._rows_of: dict[int, np.ndarray] = {}
        self._epochs: Recent[Epochs] = Recent(4)
        # A batch may lie across two blocks, and an evaluation may read another length meanwhile.
        self._blocks: Recent[tuple[np.ndarray, Packed]] = Recent(3)

    def shapes(self, length: int) -> Shapes:
        """See `Rows`."""
        names = {"tokens": INT, "segments": INT, "positions": INT, "word_starts": BOOL}
        return {name: ((length,), dtype) for name, dtype in names.items()}

    def count(self, length: int) -> int:
        """See `Rows`."""
        return int(self._rows_in_windows(length).sum())

    def _lengths(self, window: int) -> Int[np.ndarray, " documents"]:
        first, last = self._windows.range(window)
        return np.diff(self._bounds[first : last + 1]) + len(self._begin) + len(self._end)

    def _rows_in_windows(self, length: int) -> Int[np.ndarray, " windows"]:
        if length not in self._rows_of:
            counts = [packing.count_rows(self._lengths(w), length) for w in range(self._windows.count)]
            self._rows_of[length] = np.asarray(counts, np.int64)
        return self._rows_of[length]

    def _order(self, length: int, seed: int) -> Epochs:
        return self._epochs.get((length, seed), Epochs, self._rows_in_windows(length), seed, self._shuffle)

    def take(self, rows: Int[np.ndarray, " B"], *, length: int, seed: int) -> Batch:
        """See `Rows`."""
        epochs = self._order(length, seed)
        runs = epochs.runs(rows)
        parts = []
        places = []
        for block, inside, at in runs:
            key = (seed, length, block.epoch, block.number)
            tokens, packed = self._blocks.get(key, self._load, block, epochs, length)
            for stretch in np.split(np.arange(len(at)), np.flatnonzero(np.diff(inside) != 1) + 1):
                first, last = int(inside[stretch[0]]), int(inside[stretch[-1]])
                parts.append(packing.fill(tokens, packed, first, last + 1, length, self._tokenizer.specials.pad))
                places.append(at[stretch])
        if len(parts) == 1:
            tokens, segments, positions = parts[0]
        else:
            back = np.argsort(np.concatenate(places)) if places else np.zeros(0, np.int64)
            empty = np.zeros((0, length), np.int32)
            tokens, segments, positions = (
                np.concatenate([empty, *arrays])[back] for arrays in zip(*parts, strict=True)
            )
        starts = self._tokenizer.word_starts(tokens, (positions == 0) & (segments > 0))
        return {"tokens": tokens, "segments": segments, "positions": positions, "word_starts": starts}

    def _load(self, block: Block, epochs: Epochs, length: int) -> tuple[np.ndarray, Packed]:
        buffers = []
        plans = []
        base = 0
        for window in block.windows:
            first, last = self._windows.range(window)
            lengths = self._lengths(window)
            values = self._split.values("text", int(self._bounds[first]), int(self._bounds[last]))
            buffers.append(framed(values, lengths, self._begin, self._end))
            plans.append((packing.pack(lengths, length, [*epochs.words(block, 3), window]), base))
            base += len(buffers[-1])
        return np.concatenate(buffers), packing.joined(plans).reordered(epochs.within(block))


def framed(
    values: Int[np.ndarray, " values"], lengths: Int[np.ndarray, " documents"], begin: Sequence[int], end: Sequence[int]
) -> Int[np.ndarray, " tokens"]:
    """Documents that lie one behind the other, with ids put before and after each; `lengths` count these as well."""
    if not begin and not end:
        return values
    borders = offsets(lengths)
    inside = np.ones(borders[-1], np.bool_)
    out = np.empty(borders[-1], values.dtype)
    for k, special in enumerate(begin):
        inside[borders[:-1] + k] = False
        out[borders[:-1] + k] = special
    for k, special in enumerate(reversed(end)):
        inside[borders[1:] - 1 - k] = False
        out[borders[1:] - 1 - k] = special
    out[inside] = values
    return out
