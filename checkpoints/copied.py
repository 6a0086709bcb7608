"""Checkpoints in two places, so that no fault of one place costs what has been saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.restoring import restored
from checkpoints.store import Checkpoints
from partitioning.errors import UserError


class Copied:
    """The checkpoints of a run and a copy of each: `Checkpoints`, twice, behind the same methods.

    A save is over when both are written, one after the other, and the run waits for it. So one is always whole, and the run
    is never further than from one save to the next: whatever happens to a host or to a file costs that at most. Written while
    steps go on, a checkpoint that a kill cuts short costs those steps too, and one that is harmed later a further interval.

    Args:
      first: the run's own.
      second: on another disk or in another bucket.

    Raises:
      UserError: both are in one folder.
    """

    def __init__(self, first: Checkpoints, second: Checkpoints):
        if first.folder == second.folder:
            raise UserError(f"{second.folder}: the copy's folder is the run's own: use one on another disk")
        self.places = (first, second)
        self.folder, self.timeout_s = first.folder, first.timeout_s

    def steps(self) -> list[int]:
        """Steps with a checkpoint in either place, ascending."""
        return sorted({step for place in self.places for step in place.steps()})

    def save(self, step: int, arrays: Any, metadata: Mapping[str, Any]) -> bool:
        """Writes both, and waits; see `Checkpoints.save`."""
        written = []
        for place in self.places:
            written.append(place.save(step, arrays, metadata))
            place.wait()
        return any(written)

    def wait(self) -> None:
        """There is nothing to wait for: `save` has."""

    def close(self) -> None:
        """Ends the threads of both."""
        try:
            self.places[0].close()
        finally:
            self.places[1].close()

    def __enter__(self) -> Copied:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The newest that is whole in either place; see `Checkpoints.restore`."""
        return restored(self.places, abstract, step, whole=True)

    def restore_part(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """As `restore`, of some leaves only."""
        return restored(self.places, abstract, step, whole=False)

    def save_frozen(self, name: str, arrays: Any) -> dict[str, str]:
        """Writes a tree that never changes to both; see `Frozen.save_frozen`."""
        reference, _ = (place.save_frozen(name, arrays) for place in self.places)
        return reference

    def load_frozen(self, reference: Mapping[str, str], abstract: Any) -> Any:
        """A frozen tree, from the first place that has it whole; see `Frozen.load_frozen`."""
        try:
            return self.places[0].load_frozen(reference, abstract)
        except UserError as error:
            self.places[0].tell(str(error))
            return self.places[1].load_frozen(reference, abstract)
