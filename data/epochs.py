"""Epochs: which row of which window is the n-th row of a run, for any n and without reading what comes before."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from data.shuffle import permutation

WINDOWS_A_BLOCK = 4

T = TypeVar("T")


class Recent(Generic[T]):
    """The last few values of a function of a key, so that a pure function need not compute them again."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[..., T], *arguments: Any) -> T:
        """The value of the key: `make(*arguments)` when it is not held."""
        if key not in self._held:
            self._held[key] = make(*arguments)
            while len(self._held) > self._capacity:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


@dataclass(frozen=True)
class Block:
    """A few windows whose rows are shuffled together.

    Arguments:
        epoch, number: which block of which epoch.
        windows: its windows, in order.
        first: the epoch's row at which the block begins.
    """

    epoch: int
    number: int
    windows: tuple[int, ...]
    first: int


class Epochs:
    """A seeded order of all rows for each epoch: windows permuted, gathered in blocks, rows permuted in each block.

    Row n belongs to epoch n // rows, and every row comes exactly once an epoch.

    Arguments:
        rows_of: rows of each window.
        seed: of the permutations.
        shuffle: False keeps windows and rows in the order of the cache.
    """

    def __init__(self, rows_of: Int[np.ndarray, " windows"], seed: int, shuffle: bool = True):
        self._rows_of = np.asarray(rows_of, np.int64)
        self._seed = [seed & 0xFFFFFFFF, seed >> 32]
        self._shuffle = shuffle
        self.rows = int(self._rows_of.sum())
        self._orders: Recent[tuple[np.ndarray, np.ndarray]] = Recent(4)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        windows = len(self._rows_of)
        order = permutation([*self._seed, 1, epoch], windows) if self._shuffle else np.arange(windows)
        starts = np.zeros(-(-windows // WINDOWS_A_BLOCK) + 1, np.int64)
        np.cumsum(np.add.reduceat(self._rows_of[order], np.arange(0, windows, WINDOWS_A_BLOCK)), out=starts[1:])
        return order, starts

    def runs(self, rows: Int[np.ndarray, " rows"]) -> list[tuple[Block, Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]:
        """Group row numbers by block: (block, rows within it, where they stand in `rows`)."""
        out = []
        epochs, inside = np.divmod(np.asarray(rows, np.int64), self.rows)
        for epoch in np.unique(epochs).tolist():
            order, starts = self._orders.get(epoch, self._order, epoch)
            at = np.flatnonzero(epochs == epoch)
            blocks = np.searchsorted(starts, inside[at], side="right") - 1
            for number in np.unique(blocks).tolist():
                mine = at[blocks == number]
                windows = order[number * WINDOWS_A_BLOCK : (number + 1) * WINDOWS_A_BLOCK]
                block = Block(epoch, number, tuple(windows.tolist()), int(starts[number]))
                out.append((block, inside[mine] - block.first, mine))
        return out

    def within(self, block: Block) -> Int[np.ndarray, " rows"]:
        """The order of a block's rows: row r of the block is row `within[r]` of its windows laid end to end."""
        count = int(self._rows_of[list(block.windows)].sum())
        return permutation(self.words(block, 2), count) if self._shuffle else np.arange(count)

    def words(self, block: Block, purpose: int) -> Sequence[int]:
        """Seed words for a use of randomness in a block."""
        return [*self._seed, purpose, block.epoch, block.number]
