"""Which checkpoints stay: the newest, and the best by a figure."""

import math
from collections.abc import Sequence
from typing import Any, Literal


class Preserved:
    """Orbax's preservation policy for the newest checkpoints and the best one.

    Args:
      newest: how many of the newest stay.
      best: a figure's name and whether its smallest or largest value is best; None keeps no best one.
    """

    def __init__(self, newest: int, best: tuple[str, Literal["min", "max"]] | None = None):
        self._newest, self._best = newest, best
        self._values: dict[int, float] = {}

    def note(self, step: int, metadata: dict[str, Any]) -> None:
        """Takes note of the figures in a checkpoint's metadata, where it has the one that counts; NaN never does."""
        value = metadata.get("figures", {}).get(self._best[0]) if self._best else None
        if value is not None and not math.isnan(value):
            self._values[step] = value

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """See `orbax.checkpoint.checkpoint_managers.PreservationPolicy`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self._newest :])
        judged = [step for step in steps if step in self._values]
        if self._best and judged:
            # The earlier of two equals: what came after it brought nothing.
            pick = min if self._best[1] == "min" else max
            kept.add(pick(judged, key=self._values.__getitem__))
        return [step in kept for step in steps]
