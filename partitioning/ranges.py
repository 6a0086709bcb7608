"""Ranges in annotations: `Annotated[float, Range(0, 1)]`, checked when a value is built."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from partitioning.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


def check_fields(value: Any) -> None:
    """Checks the numeric fields of a dataclass against the ranges in their annotations.

    Raises:
      UserError: a number outside its range, named with its class and field.
    """
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        number = getattr(value, field.name)
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        for found in _ranges(hints[field.name]):
            if not found.low <= number <= found.high:
                raise UserError(f"{type(value).__name__}.{field.name} = {number!r}: expected a number in {found}")


def _ranges(hint: Any) -> list[Range]:
    if typing.get_origin(hint) is typing.Annotated:
        return [m for m in hint.__metadata__ if isinstance(m, Range)]
    return [found for part in typing.get_args(hint) for found in _ranges(part)]
