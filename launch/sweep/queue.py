"""Which run a worker takes next: seeds of one arm follow each other on one worker, which has their program."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Run = tuple[str, int]


class Queue:
    """Runs that wait, shared out to workers.

    Args:
      runs: (arm, seed), in the order of the sweep.
    """

    def __init__(self, runs: Iterable[Run]):
        self.waiting: dict[str, list[int]] = {}
        for arm, seed in runs:
            self.waiting.setdefault(arm, []).append(seed)
        self.held: dict[int, str] = {}
        self.planned: dict[str, int] = {}

    def share(self, arms: Sequence[str], workers: int) -> list[list[str]]:
        """Which worker plans which arms: each an unbroken part of them."""
        size, rest = divmod(len(arms), workers)
        ends = [i * size + min(i, rest) for i in range(workers + 1)]
        parts = [list(arms[a:b]) for a, b in itertools.pairwise(ends)]
        self.planned = {arm: worker for worker, part in enumerate(parts) for arm in part}
        return parts

    def take(self, worker: int) -> Run | None:
        """A worker's next run: of its own arm, else of one that it has planned, else of any that nobody is at, else of any."""
        own = self.held.get(worker)
        busy = set(self.held.values())
        free = [arm for arm in self.waiting if arm not in busy]
        planned = [arm for arm in free if self.planned.get(arm) == worker]
        # Most runs first: what is left to the end is small.
        longest = sorted(self.waiting, key=lambda arm: -len(self.waiting[arm]))
        for arm in (*([own] if own in self.waiting else []), *planned, *free, *longest):
            seed = self.waiting[arm].pop(0)
            if not self.waiting[arm]:
                del self.waiting[arm]
            self.held[worker] = arm
            return arm, seed
        self.held.pop(worker, None)
        return None

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))
