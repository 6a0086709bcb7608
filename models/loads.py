"""Tallies in figures and words: how evenly the layers' experts are used, on the host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from models.side import Tally

_LAYER = re.compile(r"(?P<tree>.*)/layers/(?P<index>\d+)")


@dataclass(frozen=True)
class Load:
    """One layer's tally.

    load_e = chosen_e / sum(chosen);  entropy = -sum_e load_e log load_e / log E, 1 where all parts are used alike and 0 where
    one is;  largest, least = E max load, E min load, over the mean.

    Args:
      tally: with numpy arrays of one layer.
    """

    tally: Tally

    @cached_property
    def shares(self) -> Float[np.ndarray, E]:
        """The load of each part; not a number where nothing was chosen."""
        return _over(self.tally.chosen, np.asarray(self.tally.chosen, np.float64).sum())

    @property
    def entropy(self) -> float:
        """Between 0 and 1."""
        used = self.shares[self.shares != 0]
        size = len(self.shares)
        return float(-(used * np.log(used)).sum() / np.log(size)) if size > 1 else 1.0

    @property
    def largest(self) -> float:
        """The largest load over the mean."""
        return float(self.shares.max() * len(self.shares))

    @property
    def least(self) -> float:
        """The least load over the mean."""
        return float(self.shares.min() * len(self.shares))

    @property
    def unused(self) -> list[int]:
        """The parts that nothing chose, where anything was chosen."""
        return np.flatnonzero(self.shares == 0).tolist()

    @cached_property
    def dropped(self) -> Float[np.ndarray, E] | None:
        """By part, the choices that found no room, as a share of all choices of the layer."""
        if self.tally.dropped is None:
            return None
        return _over(self.tally.dropped, np.asarray(self.tally.chosen, np.float64).sum())

    @cached_property
    def bias(self) -> Float[np.ndarray, E] | None:
        """Of each part."""
        return None if self.tally.bias is None else _over(self.tally.bias, self.tally.calls)


def _over(sums: Any, count: Any) -> Float[np.ndarray, E]:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums, np.float64) / np.asarray(count, np.float64)


class Loads:
    """The loads of all layers that choose, by tree and index: `trunk/layers/3`.

    Args:
      tallies: by call and block, as `Models.tallies` has them.
    """

    def __init__(self, tallies: Mapping[str, Tally]):
        by_layer: dict[str, Load] = {}
        for name, tally in jax.device_get(dict(tallies)).items():
            # A block's path ends in `scanned/<k>` or `layers/<i>`, and then what the tally is called.
            tree = name.rsplit("/", 3)[0]
            for r, index in enumerate(tally.layers):
                one = jax.tree.map(lambda x, r=r: x[r], tally) if np.ndim(tally.chosen) > 1 else tally
                by_layer[f"{tree}/layers/{index}"] = Load(one)
        self.layers: dict[str, Load] = dict(sorted(by_layer.items(), key=lambda item: _place(item[0])))

    def __bool__(self) -> bool:
        return bool(self.layers)

    def figures(self) -> dict[str, float | np.ndarray]:
        """By layer the arrays `load`, `dropped` and `bias` and the numbers of `Load`; by tree the mean `entropy`, the `largest`
        load of all layers and the mean share of `dropped` choices."""
        out: dict[str, float | np.ndarray] = {}
        for name, load in self.layers.items():
            arrays = {"load": load.shares, "dropped": load.dropped, "bias": load.bias}
            numbers = {"entropy": load.entropy, "largest": load.largest, "least": load.least}
            found = {**arrays, **numbers, "unused": float(len(load.unused))}
            out |= {f"{load.tally.of}s/{name}/{key}": value for key, value in found.items() if value is not None}
        for tree, loads in self._trees().items():
            figures = zip(("entropy", "largest", "dropped"), _whole(loads), strict=True)
            out |= {f"{loads[0].tally.of}s/{tree}/{key}": value for key, value in figures if value is not None}
        return out

    def words(self) -> str:
        """The trunk's loads in a few words, where it has any."""
        for tree, loads in self._trees().items():
            if tree.split("/")[0] == "trunk":
                entropy, largest, dropped = _whole(loads)
                words = f"{loads[0].tally.of} entropy {entropy:.2f}, largest load {largest:.1f}x"
                return words if dropped is None else f"{words}, dropped {100 * dropped:.1f}%"
        return ""

    def table(self) -> list[tuple[str, ...]]:
        """A row a layer, under a head; loads are over the mean."""
        head = ("layer", "entropy", "largest/mean", "least/mean", "unused", "dropped", "bias")
        rows = [
            (
                name,
                f"{load.entropy:.4f}",
                f"{load.largest:.2f}",
                f"{load.least:.2f}",
                f"{len(load.unused)} of {len(load.shares)}",
                "" if load.dropped is None else f"{100 * load.dropped.sum():.2f}%",
                "" if load.bias is None else f"{load.bias.min():+.4f} to {load.bias.max():+.4f}",
            )
            for name, load in self.layers.items()
        ]
        return [head, *rows]

    def _trees(self) -> dict[str, list[Load]]:
        out: dict[str, list[Load]] = {}
        for name, load in self.layers.items():
            out.setdefault(_place(name)[0], []).append(load)
        return out


def _whole(loads: Sequence[Load]) -> tuple[float, float, float | None]:
    """Of some layers: the mean entropy, the largest load over the mean, the mean share of dropped choices, if any may be."""
    dropped = [load.dropped.sum() for load in loads if load.dropped is not None]
    entropy = float(np.mean([load.entropy for load in loads]))
    return entropy, max(load.largest for load in loads), float(np.mean(dropped)) if dropped else None


def _place(name: str) -> tuple[str, int]:
    found = _LAYER.fullmatch(name)
    return (found["tree"], int(found["index"])) if found else (name, 0)


def named(of: str, layer: str, parts: Sequence[int]) -> str:
    """Parts of a layer in words: `trunk, layer 3: experts 0-4, 7`.

    Args:
      of: what a part is called.
      layer: as in `Loads.layers`.
      parts: ascending.
    """
    tree, index = _place(layer)
    return f"{tree}, layer {index}: {of}{'s' if len(parts) > 1 else ''} {', '.join(_runs(parts))}"


def _runs(numbers: Iterable[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
