"""What is in a compiled program: its arrays, and its collectives with the devices that each joins."""

from __future__ import annotations

import re
from dataclasses import dataclass

from partitioning.collectives import groups

_COLLECTIVE = re.compile(
    r" = (?P<result>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One of a program's collectives.

    Args:
      kind: such as all-gather.
      shapes: of its results.
      groups: devices that it joins, as places in the flattened mesh.
    """

    kind: str
    shapes: list[tuple[int, ...]]
    groups: list[list[int]]


def shapes(text: str) -> list[tuple[int, ...]]:
    """All shapes that a text mentions."""
    return [_numbers(found) for found in _SHAPE.findall(text)]


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of an optimised program."""
    found = filter(None, map(_COLLECTIVE.search, text.splitlines()))
    return [Collective(m["kind"], shapes(m["result"]), groups(m["rest"], devices).tolist()) for m in found]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
