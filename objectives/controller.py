"""Controllers: decisions on the host, between steps, written down before they take effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Reads statistics summed over the last `every` steps and returns values for the control log.

    The log is part of the checkpoint, and the data reads it; a value takes effect `delay` steps after the decision, so
    that batches which were prefetched, and other hosts, do not see it early.

    Args:
      every: steps between decisions.
      delay: steps from a decision to its effect.
    """

    every: Annotated[int, Range(1, 1 << 40)] = 100
    delay: Annotated[int, Range(8, 1 << 40)] = 8

    def __post_init__(self):
        check_fields(self)

    def decide(self, stats: Mapping[str, np.ndarray], current: Mapping[str, Any]) -> dict[str, Any]:
        """New values for the control log; an empty dict changes nothing.

        Args:
          stats: sums over the last `every` steps, `<term>/total` and `<term>/weight`; by source under `source/`.
          current: the values in force, such as `{"mixture": {"docs": 0.5, "code": 0.5}}`.
        """
        raise TypeError(f"{type(self).__name__} is a controller without a rule: define `decide`")
