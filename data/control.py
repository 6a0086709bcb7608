"""Entries of the control log: what a controller changed, and from when on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ControlEntry:
    """One change that takes effect at a declared step.

    Arguments:
        step: the first step (counted within the stage, as `Reader.batch` counts) that sees the change.
        values: what changes, by the name of its consumer, e.g. `{"mixture": {"docs": 0.3, "code": 0.7}}`.
        row: the first global row (counted over all stages) that sees the change. An entry that must survive its own
            stage carries it, because a later stage cannot know the batch sizes of earlier ones. When None it is
            `start + step * batch_size` of the call that reads the entry.
    """

    step: int
    values: Mapping[str, Any]
    row: int | None = None
