"""Watches for experts that no token comes to any more, and says so once."""

from __future__ import annotations

import numpy as np

from models.loads import Loads, named


class Unused:
    """Counts for each part of each layer the steps since a token last chose it.

    A part is dead after `window` steps without a token. Steps in which nothing chose at all do not count. A start that goes on
    from a checkpoint counts anew.

    Args:
      window: in steps.
    """

    def __init__(self, window: int):
        self._window = window
        self._idle: dict[str, np.ndarray] = {}

    def add(self, loads: Loads) -> list[str]:
        """Takes a step in; returns a line for each layer in which parts have just died, and in which some have come back."""
        lines = []
        for name, load in loads.layers.items():
            chosen = np.asarray(load.tally.chosen)
            if not chosen.any():
                continue
            before = self._idle.get(name, np.zeros(len(chosen), np.int64))
            now = self._idle[name] = np.where(chosen > 0, 0, before + 1)
            died, back = (now == self._window), (before >= self._window) & (now == 0)
            for which, words in (
                (died, f"no token for {self._window} steps: dead"),
                (back, "tokens again, after being dead"),
            ):
                if which.any():
                    lines.append(f"{named(load.tally.of, name, np.flatnonzero(which).tolist())}: {words}")
        return lines
