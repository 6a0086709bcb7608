"""Ranges of numeric arguments, written in their annotations and checked wherever the object is built."""

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Annotated, Any, Literal

from partitioning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, for use as `Annotated[float, Range(0, 1)]`.

    Args:
        low: smallest allowed number.
        high: largest allowed number.
        open: which ends do not belong to it: False (none), True (both), "low" or "high".
    """

    low: float = -math.inf
    high: float = math.inf
    _: dataclasses.KW_ONLY
    open: bool | Literal["low", "high"] = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open in (True, "low") else self.low <= value
        below = value < self.high if self.open in (True, "high") else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        open_low, open_high = self.open in (True, "low"), self.open in (True, "high")
        if math.isinf(self.low) and math.isinf(self.high):
            return "that is finite" if open_low and open_high else "of any size"
        if math.isinf(self.high):
            return f"{'above' if open_low else 'of at least'} {_short(self.low)}"
        if math.isinf(self.low):
            return f"{'below' if open_high else 'of at most'} {_short(self.high)}"
        ends = f"{_short(self.low)}, {_short(self.high)}"
        return f"in {'(' if open_low else '['}{ends}{')' if open_high else ']'}"


def _short(end: float) -> str:
    return str(end) if isinstance(end, int) else f"{end:g}"


def number(value: Any) -> bool:
    """Whether `value` is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def violated(value: Any, annotation: Any) -> Range | None:
    """The range in `annotation` that the number `value` falls out of, or None. What is no number is in no range's way.

    In a union it is enough that one member admits the number.
    """
    if not number(value):
        return None
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        for mark in annotation.__metadata__:
            if isinstance(mark, Range) and value not in mark:
                return mark
        return violated(value, annotation.__origin__)
    if origin in (typing.Union, types.UnionType):
        # Only the members that carry a range speak about numbers; None or a schedule beside them does not admit one.
        plain = [a for a in typing.get_args(annotation) if a in (int, float)]
        found = [violated(value, a) for a in typing.get_args(annotation) if typing.get_origin(a) is Annotated]
        if found and not plain and all(f is not None for f in found):
            return found[0]
    return None


@functools.cache
def _ranged(cls: type) -> tuple[tuple[str, Any], ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple((f.name, hints[f.name]) for f in dataclasses.fields(cls) if _has_range(hints[f.name]))


def _has_range(annotation: Any) -> bool:
    marks = getattr(annotation, "__metadata__", ())
    return any(isinstance(m, Range) for m in marks) or any(map(_has_range, typing.get_args(annotation)))


def check_fields(instance: Any) -> None:
    """Check the ranges in a dataclass's annotations; call it from `__post_init__`.

    Errors: UserError, naming class, field, value and range.
    """
    cls: Any = type(instance)
    for name, annotation in _ranged(cls):
        value = getattr(instance, name)
        outside = violated(value, annotation)
        if outside is not None:
            raise UserError(f"{cls.__name__}.{name} = {value!r}: expected a number {outside}")
