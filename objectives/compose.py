"""Objectives made of objectives: weighted sums, and phases over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax.numpy as jnp

from objectives.base import Loss, Objective, Schedule, Term, at
from objectives.draws import Draws
from partitioning import UserError
from partitioning.ranges import Range, check_fields


@dataclass(frozen=True, kw_only=True)
class Weighted(Objective):
    """loss = sum_i w_i loss_i; each part's terms are named `<part>/<term>`.

    Args:
      parts: objectives by name.
      weights: a number or a schedule for each part; 1 for those that are not named.

    Raises:
      UserError: a weight for a part that is not there.
    """

    parts: Mapping[str, Objective]
    weights: Mapping[str, Any] | None = None

    def __post_init__(self):
        for name in self.weights or {}:
            if name not in self.parts:
                raise UserError(f"Weighted.weights names {name!r}: the parts are {', '.join(self.parts)}")

    @property
    def couples_rows(self):
        """Whether a part does."""
        return any(part.couples_rows for part in self.parts.values())

    def fields(self):
        """What all parts need."""
        return tuple(dict.fromkeys(field for part in self.parts.values() for field in part.fields()))

    def children(self):
        """The parts."""
        return tuple(self.parts.values())

    def companions(self, trunk, rngs):
        """All parts' trees; two parts that bring one name are an error."""
        found: dict[str, Any] = {}
        for name, part in self.parts.items():
            for tree, companion in part.companions(trunk, rngs).items():
                if tree in found:
                    raise UserError(
                        f"Weighted: part {name!r} brings a tree named {tree!r}, and so does an earlier part"
                    )
                found[tree] = companion
        return found

    def prepare(self, models, batch, *, step, key):
        """Every part in turn."""
        for name, part in self.parts.items():
            batch = part.prepare(models, batch, step=step, key=_within(key, name))
        return batch

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        terms: dict[str, Term] = {}
        rows: dict[str, Any] = {}
        for name, part in self.parts.items():
            loss = part(models, batch, step=step, key=_within(key, name))
            weight = at((self.weights or {}).get(name, 1.0), step)
            terms |= {f"{name}/{term}": value.scaled(weight) for term, value in loss.terms.items()}
            rows |= {f"{name}/{field}": value for field, value in loss.rows.items()}
        return Loss(terms, rows)

    def after_step(self, models, rows, stats, *, step):
        """Every part with its own rows and statistics."""
        for name, part in self.parts.items():
            mine = f"{name}/"
            own_rows, own_stats = (
                {k.removeprefix(mine): v for k, v in values.items() if k.startswith(mine)} for values in (rows, stats)
            )
            side = {k: v for k, v in stats.items() if k.startswith("side/")}
            part.after_step(models, own_rows, own_stats | side, step=step)


@dataclass(frozen=True, kw_only=True)
class Phases(Objective):
    """One objective after another: part i for `lengths[i]` steps, and the last from then on, or all again in a cycle.

    Every part is part of the one compiled step; only the phase's own terms have weight in it. Objectives that need
    other shapes, or that are too dear to compute in vain, belong in stages of the run.

    Args:
      parts: objectives by name, in order.
      lengths: steps of each phase.
      cycle: whether the phases start again.

    Raises:
      UserError: not one length for each part.
    """

    parts: Mapping[str, Objective]
    lengths: Sequence[Annotated[int, Range(1, 1 << 40)]]
    cycle: bool = False

    def __post_init__(self):
        check_fields(self)
        if len(self.parts) != len(self.lengths):
            raise UserError(
                f"Phases has {len(self.parts)} parts and {len(self.lengths)} lengths: give one length for each part"
            )

    def _weighted(self) -> Weighted:
        def schedule(i: int) -> Schedule:
            start, stop = sum(self.lengths[:i]), sum(self.lengths[: i + 1])

            def weight(step):
                place = step % sum(self.lengths) if self.cycle else step
                last = (i == len(self.lengths) - 1) and not self.cycle
                return jnp.where((place >= start) & (last | (place < stop)), 1.0, 0.0)

            return weight

        return Weighted(parts=self.parts, weights={name: schedule(i) for i, name in enumerate(self.parts)})

    @property
    def couples_rows(self):
        """Whether a part does."""
        return self._weighted().couples_rows

    def fields(self):
        """What all parts need."""
        return self._weighted().fields()

    def children(self):
        """The parts."""
        return self._weighted().children()

    def companions(self, trunk, rngs):
        """All parts' trees."""
        return self._weighted().companions(trunk, rngs)

    def prepare(self, models, batch, *, step, key):
        """Every part in turn."""
        return self._weighted().prepare(models, batch, step=step, key=key)

    def __call__(self, models, batch, *, step, key):
        """See `Objective.__call__`."""
        return self._weighted()(models, batch, step=step, key=key)

    def after_step(self, models, rows, stats, *, step):
        """Every part with its own rows and statistics."""
        self._weighted().after_step(models, rows, stats, step=step)


def _within(key: Draws, name: str) -> Draws:
    """Draws of a part: two parts that use one name do not share a draw."""
    return replace(key, step_key=key.batch(f"part/{name}"))
