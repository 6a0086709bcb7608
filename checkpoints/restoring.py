"""Which checkpoint a run goes on from: the newest that is whole, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from checkpoints.faults import BrokenError
from checkpoints.leaves import NAMED_AT_MOST, like_abstract, named_leaves, plain_abstract
from partitioning.errors import UserError


class Place(Protocol):
    """Where checkpoints are; `checkpoints.store.Checkpoints` is one."""

    folder: Any

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""

    def take(self, step: int, stored: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Metadata and leaves of one."""

    def tell(self, line: str) -> None:
        """Takes a line about one that is passed over."""

    def goes_on_from(self, step: int) -> None:
        """What is newer has no future."""


def restored(places: Sequence[Place], abstract: Any, step: int | None, *, whole: bool) -> tuple[Any, dict[str, Any]]:
    """The newest whole checkpoint of several places, or that of one step, laid out as `abstract` says.

    Args:
      places: of one step, the first that has it whole gives it.
      abstract: as in `Checkpoints.restore`.
      step: None takes the newest that is whole, and tells of those it passes over.
      whole: whether `abstract` is all that a checkpoint should have; the places then go on from it.

    Returns:
      The arrays in the structure of `abstract`, and the metadata that was saved with them.

    Raises:
      UserError: there is no checkpoint; none is whole; it is of another model.
    """
    folders = " and ".join(str(place.folder) for place in places)
    there = {place.folder: place.steps() for place in places}
    steps = sorted({one for found in there.values() for one in found})
    if not steps or (step is not None and step not in steps):
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise UserError(f"no {what} in {folders}; steps there: {', '.join(map(str, steps)) or 'none'}")
    wanted = named_leaves(abstract)
    stored = {name: plain_abstract(leaf) for name, leaf in wanted.items()}
    reasons: list[str] = []
    for candidate in reversed(steps) if step is None else [step]:
        broken = []
        for place in (place for place in places if candidate in there[place.folder]):
            where = place.folder / str(candidate)
            try:
                metadata, flat = place.take(candidate, stored, whole=whole)
            except BrokenError as error:
                broken.append(place.folder)
                reasons.append(f"{where}: {error}")
                if step is None:
                    place.tell(f"checkpoint {where} is broken and skipped: {error}")
                continue
            if place is not places[0]:
                place.tell(f"checkpoint {candidate} is read from its copy, {where}")
            if whole:
                for other in places:
                    whole_there = candidate in there[other.folder] and other.folder not in broken
                    other.goes_on_from(candidate if whole_there else candidate - 1)
            leaves = [like_abstract(flat[name], leaf) for name, leaf in wanted.items()]
            return jax.tree.unflatten(jax.tree.structure(abstract), leaves), metadata
    raise UserError(f"no complete checkpoint in {folders}: " + "; ".join(reasons[:NAMED_AT_MOST]))
