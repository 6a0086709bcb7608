"""The control log: what controllers decided, and the statistics they have yet to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.control import ControlEntry
from objectives.controller import Controller


@dataclass
class ControlLog:
    """Collects sums, asks each controller when it is due, and keeps the decisions.

    It is saved whole with every checkpoint, sums included, so that a resumed run decides as the run that never stopped.

    Args:
      controllers: in the config's order.
      entries: decisions so far.
      pending: sums since each controller's last decision.
    """

    controllers: tuple[Controller, ...]
    entries: list[ControlEntry] = field(default_factory=list)
    pending: list[dict[str, np.ndarray]] = field(default_factory=list)

    def __post_init__(self):
        self.pending = self.pending or [{} for _ in self.controllers]

    def observe(self, step: int, sums: Mapping[str, Any], first: Mapping[str, Any], row: Any) -> None:
        """Adds a step's sums and lets controllers that are due decide.

        Args:
          step: steps done, this one included.
          sums: by name, as the step returned them.
          first: the values in force before any decision, such as the data's weights.
          row: from a step to the run's first row of it.
        """
        values = {name: np.asarray(value, np.float64) for name, value in sums.items()}
        for controller, pending in zip(self.controllers, self.pending, strict=True):
            for name, value in values.items():
                pending[name] = pending[name] + value if name in pending else value
            if step % controller.every == 0:
                if new := controller.decide(pending, self.current(first)):
                    at = step + controller.delay
                    self.entries.append(ControlEntry(step=at, values=new, row=row(at)))
                pending.clear()

    def current(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """The newest value of everything, decided or as it began."""
        out = dict(first)
        for entry in self.entries:
            out |= entry.values
        return out

    def saved(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "entries": [{"step": e.step, "values": dict(e.values), "row": e.row} for e in self.entries],
            "pending": [{name: value.tolist() for name, value in sums.items()} for sums in self.pending],
        }

    @classmethod
    def restored(cls, controllers: Sequence[Controller], saved: Mapping[str, Any]) -> ControlLog:
        """The log that was saved; a controller that is new starts with nothing."""
        pending = [{name: np.asarray(v, np.float64) for name, v in sums.items()} for sums in saved["pending"]]
        pending = (pending + [{} for _ in controllers])[: len(controllers)]
        return cls(tuple(controllers), [ControlEntry(**entry) for entry in saved["entries"]], pending)
