"""What is in a compiled program: its arrays, and its collectives with the devices that each joins."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_COLLECTIVE = re.compile(
    r" = (?P<result>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")
_PAIRS = re.compile(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<turn>[\d,]+)\))?\))? \{(?P<over>[^}]*)\}"
)


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
    return [Collective(m["kind"], shapes(m["result"]), _groups(m["rest"], devices)) for m in found]


def _groups(text: str, devices: int) -> list[list[int]]:
    if m := _PAIRS.search(text):
        return [list(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", m[1])]
    if m := _IOTA.search(text):
        return _turned(m[2], m[3], devices).reshape(_numbers(m[1])).tolist()
    if m := _MESH.search(text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", m["sizes"]))
        over = re.findall(r"'(\w+)'", m["over"])
        assert len(over) == m["over"].count("'") // 2
        assert ":" not in m["over"], text
        grid = _turned(m["dims"], m["turn"], devices).reshape([int(size) for size in axes.values()])
        grid = np.moveaxis(grid, [list(axes).index(name) for name in over], range(-len(over), 0))
        return grid.reshape(-1, int(np.prod([int(axes[name]) for name in over]))).tolist()
    raise AssertionError(f"groups of another notation: {text[:300]}")


def _turned(dims: str | None, turn: str | None, devices: int) -> np.ndarray:
    grid = np.arange(devices).reshape(devices if dims is None else _numbers(dims))
    return grid if turn is None else grid.transpose(_numbers(turn))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
