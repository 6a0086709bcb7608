"""Dynamic data mixing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from objectives.controller import Controller
from partitioning import UserError
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class ExcessLossMixing(Controller):
    """Sources that are still learned badly get more rows.

    w_i <- (1 - floor) softmax_i(log w_i + rate * max(loss_i - reference_i, 0)) + floor / n

    Args:
      term: the loss term whose mean by source is read.
      rate: of the exponentiated update.
      floor: share of the rows that is spread evenly.
      reference: loss by source that a trained model reaches; 0 for sources that are not named.

    Raises:
      UserError: the run has no such term by source, or a reference for a source that is not mixed.

    Source: "DoReMi", Xie et al., 2023.
    Differs: the weights drive the data as they are found, not their average in a second run; without `reference` the
      loss itself is read.
    """

    term: str = "mlm"
    rate: Annotated[float, Range(0, 1e4)] = 1.0
    floor: Annotated[float, Range(0, 1)] = 0.01
    reference: Mapping[str, float] | None = None

    def __post_init__(self):
        check_fields(self)

    def decide(self, stats, current):
        """See `Controller.decide`."""
        mixture = current.get("mixture", {})
        total, weight = (stats.get(f"source/{self.term}/{part}") for part in ("total", "weight"))
        if total is None or weight is None:
            raise UserError(
                f"{type(self).__name__}.term = {self.term!r}: no such term by source in this run; mix several sources"
            )
        for name in self.reference or {}:
            if name not in mixture:
                raise UserError(f"{type(self).__name__}.reference names {name!r}: the sources are {', '.join(mixture)}")
        names = list(mixture)
        old = np.array([mixture[name] for name in names], np.float64)
        base = np.array([(self.reference or {}).get(name, 0.0) for name in names])
        # A source without a row since the last decision has no news.
        seen = np.asarray(weight) > 0
        excess = np.where(seen, np.asarray(total, np.float64) / np.where(seen, weight, 1), base) - base
        scores = np.log(np.maximum(old, 1e-12)) + self.rate * np.maximum(excess, 0)
        share = np.exp(scores - scores.max())
        new = (1 - self.floor) * share / share.sum() + self.floor / len(names)
        return {"mixture": {name: float(w) for name, w in zip(names, new, strict=True)}}
