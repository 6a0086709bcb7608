"""Packing: which pieces of which documents share a row, planned for one fixed window of examples at a time.

A document longer than a row is cut into full rows and a rest. The pieces of a window then go into rows by best-fit
decreasing, which looks at lengths only: so a window gives the same number of rows in every epoch, and row numbers can
be mapped to windows without packing anything. What an epoch's seed changes is which of several equally long pieces goes
where, and the order of the pieces inside a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from data.columns import offsets, ragged_index
from data.shuffle import random_words


@dataclass(frozen=True)
class Packed:
    """The rows of a window or block as runs of pieces, in row order.

    `begin[p]` and `size[p]` locate piece p in the flat tokens; row r owns the pieces `first[r]:first[r + 1]`.
    """

    begin: Int[np.ndarray, " pieces"]
    size: Int[np.ndarray, " pieces"]
    first: Int[np.ndarray, " rows_and_1"]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.first) - 1

    def reordered(self, order: Int[np.ndarray, " rows"]) -> "Packed":
        """Row r of the result is row `order[r]`."""
        counts = np.diff(self.first)[order]
        pieces = ragged_index(self.first[order], counts)
        return Packed(self.begin[pieces], self.size[pieces], offsets(counts))


def cut(
    lengths: Int[np.ndarray, " documents"], row_length: int
) -> tuple[Int[np.ndarray, " pieces"], Int[np.ndarray, " pieces"]]:
    """Cut documents that lie one behind the other into pieces of at most `row_length`: (begin, size) of each piece."""
    lengths = lengths.astype(np.int64)
    pieces = -(-lengths // row_length)
    starts = np.cumsum(lengths) - lengths
    which = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size = np.minimum(lengths[which] - number * row_length, row_length)
    return starts[which] + number * row_length, size


def count_rows(lengths: Int[np.ndarray, " documents"], row_length: int) -> int:
    """How many rows the documents of one window fill."""
    _, size = cut(lengths, row_length)
    return best_fit(np.sort(size)[::-1], row_length)[1]


def best_fit(sizes: Int[np.ndarray, " pieces"], row_length: int) -> tuple[Int[np.ndarray, " pieces"], int]:
    """Best-fit decreasing: each piece goes into the fullest row that still has room for it.

    Pieces of equal size are placed together: the fullest row with room takes as many as fit, since it stays the fullest
    while it has room. Rows with the same room left are interchangeable and kept in one list, and a bit set of the rooms
    that exist finds the next one, so the cost grows with the number of distinct sizes rather than of pieces.

    Arguments:
        sizes: piece sizes in tokens, in descending order, each between 1 and `row_length`.
        row_length: tokens in a row.
    Returns: the row of each piece, and the number of rows.
    """
    kinds, counts = np.unique(sizes, return_counts=True)
    rows: list[int] = []
    room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when room[r] is not empty
    total = 0
    for size, left in zip(kinds[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = rooms >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                bins = room[space]
            else:
                space = row_length
                bins = list(range(total, total + -(-left // (row_length // size))))
                total += len(bins)
            each = space // size
            full = min(len(bins), left // each)
            partly = left % each if full < len(bins) else 0
            for taken, times in ((bins[:full], each), (bins[full : full + 1], partly)):
                if not times or not taken:
                    continue
                rows.extend(taken if times == 1 else [row for row in taken for _ in range(times)])
                left -= len(taken) * times
                rest = space - times * size
                if rest:
                    room.setdefault(rest, []).extend(taken)
                    rooms |= 1 << rest
            if fitting:
                remaining = bins[full + (1 if partly else 0) :]
                # `rest` is smaller than `space`, so the list just extended is another one.
                room[space] = remaining
                if not remaining:
                    rooms &= ~(1 << space)
    return np.asarray(rows, np.int64), total


def pack(lengths: Int[np.ndarray, " documents"], row_length: int, seed: Sequence[int]) -> Packed:
    """Pack the documents of one window, which lie one behind the other.

    Arguments:
        lengths: tokens of each document.
        row_length: tokens in a row.
        seed: words that break ties between equal sizes and order the pieces in a row.
    """
    begin, size = cut(lengths, row_length)
    noise = random_words(seed, 2 * len(size)).reshape(2, -1)
    ranked = np.lexsort((noise[0], -size))
    rows, total = best_fit(size[ranked], row_length)
    into = np.lexsort((noise[1], rows))
    final = ranked[into]
    return Packed(begin[final], size[final], offsets(np.bincount(rows, minlength=total)))


def joined(parts: Sequence[tuple[Packed, int]]) -> Packed:
    """Rows of several windows behind one another; each comes with the place of its tokens in the joined tokens."""
    return Packed(
        np.concatenate([packed.begin + base for packed, base in parts]),
        np.concatenate([packed.size for packed, _ in parts]),
        offsets(np.concatenate([np.diff(packed.first) for packed, _ in parts])),
    )


def fill(
    tokens: Int[np.ndarray, " tokens"], packed: Packed, start: int, stop: int, row_length: int, pad: int
) -> tuple[Int[np.ndarray, "rows S"], Int[np.ndarray, "rows S"], Int[np.ndarray, "rows S"]]:
    """Write rows start..stop-1 out: tokens, segments (1.. in a row, 0 is padding) and positions (from 0 in each piece).

    Every row is given one more piece, its padding, so that the pieces cover the output exactly and each array is one
    `repeat`: no loop over rows and no scatter.
    """
    rows = stop - start
    low, high = int(packed.first[start]), int(packed.first[stop])
    counts = np.diff(packed.first[start : stop + 1])
    row = np.repeat(np.arange(rows), counts)
    size = packed.size[low:high]
    used = np.bincount(row, weights=size, minlength=rows).astype(np.int64)
    # Slot of each piece among pieces and paddings: the padding of row r follows its last piece.
    slot = np.arange(high - low) + row
    ends = packed.first[start + 1 : stop + 1] - low + np.arange(rows)
    sizes = np.empty(high - low + rows, np.int64)
    sizes[slot], sizes[ends] = size, row_length - used
    segment = np.zeros(len(sizes), np.int32)
    segment[slot] = slot - np.repeat(packed.first[start:stop] - low + np.arange(rows), counts) + 1
    offset = np.cumsum(sizes) - sizes
    source = np.zeros(len(sizes), np.int64)
    source[slot] = packed.begin[low:high]
    flat = np.arange(rows * row_length, dtype=np.int32)
    segments = np.repeat(segment, sizes)
    positions = flat - np.repeat(offset.astype(np.int32), sizes)
    index = positions + np.repeat(source, sizes)
    padding = segments == 0
    # Indices of padding may lie past the end: they are clipped, and what they fetch is overwritten.
    out = tokens.take(index, mode="clip").astype(np.int32) if len(tokens) else np.zeros(len(index), np.int32)
    out[padding] = pad
    positions[padding] = 0
    shape = (rows, row_length)
    return out.reshape(shape), segments.reshape(shape), positions.reshape(shape)
