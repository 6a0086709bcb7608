"""A run's folder as it was left: configuration, figures by step, environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.bindings import bindings_of
from partitioning.errors import UserError
from training.environment import environments
from training.goodput import KINDS, PREFIX, WALL
from training.metrics import FILE as METRICS
from training.spent import FLOPS, TOKENS

JUDGED = "evaluation/"
AXES = {"steps": "steps", "tokens": TOKENS, "FLOPs": FLOPS, "seconds": "seconds"}
"""What curves are drawn over, and where it comes from: metrics, or the seconds of steps and of waiting for data."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A figure at the steps at which it was logged.

    Args:
      steps: rising.
      values: as many.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class RunFolder:
    """One run.

    Args:
      path: its folder.
      name: what the page calls it.
      config: the text of its configuration; empty for a run that a program started.
      rows: the lines of its metrics.
    """

    path: Path
    name: str
    config: str
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> RunFolder:
        """Reads a folder.

        Raises:
          UserError: no folder of a run, or of one that has not logged a step.
        """
        if not path.is_dir():
            raise UserError(f"{path}: {'is a file' if path.exists() else 'no such folder'}, expected a run's folder")
        config = path / "config.gin"
        if not config.is_file() and not (path / METRICS).is_file():
            raise UserError(
                f"{path}: neither config.gin nor metrics.jsonl nor sweep.json in it, expected the folder of a run "
                f"(`palmette train ... --out {path}`) or of a sweep"
            )
        rows = logged(path / METRICS)
        if not any(_told(row) for row in rows):
            raise UserError(
                f"{path / METRICS}: {'no step is logged yet' if rows or (path / METRICS).exists() else 'no such file'}: "
                "the run has not begun, or was stopped before its first step; the same `palmette train` goes on with it"
            )
        # A run that a program started has no configuration's text.
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
        return cls(path, path.name if name is None else name, text, rows)

    @cached_property
    def bindings(self) -> dict[str, str]:
        """The configuration's values by name."""
        return bindings_of(self.config, str(self.path / "config.gin"))

    @cached_property
    def seed(self) -> str:
        """Of the run, as its configuration says it."""
        return self.bindings.get("training.Run.seed", "0")

    @cached_property
    def step(self) -> int:
        """The last that was logged."""
        return max(int(row["step"]) for row in self.rows)

    @cached_property
    def steps(self) -> int | None:
        """How many the run was to take, where its configuration says it in numbers."""
        return _planned(self.bindings)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Every figure that is a number, by name; of a step that is told twice the later line counts."""
        found: dict[str, dict[int, float]] = {}
        for row in self.rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float | str):
                    found.setdefault(name, {})[int(row["step"])] = float(value)
        return {name: _curve(points) for name, points in found.items()}

    @cached_property
    def figures(self) -> dict[str, float]:
        """The last value of the loss and of each evaluator's figures."""
        names = [name for name in self.curves if name.startswith(JUDGED) and not _is_load(name)]
        last = {name.removeprefix(JUDGED): float(self.curves[name].values[-1]) for name in names}
        return ({"loss": float(self.curves["loss"].values[-1])} if "loss" in self.curves else {}) | last

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The last value of every figure that is a list, by name."""
        found = {}
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, list):
                    found[name] = np.array([float(x) for x in value])
        return found

    @cached_property
    def environment(self) -> list[dict[str, Any]]:
        """The starts of the run and what they ran on."""
        return environments(self.path)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Wall time by kind, at the last split that was logged."""
        last: Mapping[str, Any] = next((row for row in reversed(self.rows) if WALL in row), {})
        return {kind: last[f"{PREFIX}{kind}"] * last[WALL] for kind in KINDS} if last else {}

    @cached_property
    def axes(self) -> dict[str, Curve]:
        """What had been spent at each step that says it, by axis; an axis that the run has no record of is left out."""
        found: dict[str, dict[int, float]] = {axis: {} for axis in AXES if axis != "steps"}
        for row in self.rows:
            for axis in ("tokens", "FLOPs"):
                if AXES[axis] in row:
                    found[axis][int(row["step"])] = float(row[AXES[axis]])
            if WALL in row:
                share = row[f"{PREFIX}step"] + row[f"{PREFIX}data"]
                found["seconds"][int(row["step"])] = share * row[WALL]
        return {axis: _curve(points) for axis, points in found.items() if points}

    def spent(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Tokens, FLOPs or seconds at some steps: linear between the steps that say it, and from nothing before the first."""
        known = self.axes[axis]
        return np.interp(steps, [0, *known.steps], [0.0, *known.values])

    def total(self, axis: str) -> float | None:
        """What was spent in all."""
        return float(self.axes[axis].values[-1]) if axis in self.axes else None


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; of a run that is going on the last may be cut short.

    Raises:
      UserError: another line is no figures of a step.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().decode(errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise UserError(
                f'{path}:{number}: expected a line of figures such as {{"step": 10, "loss": 2.5}}'
            ) from None
        found.append(row)
    return found


def _told(row: Mapping[str, Any]) -> bool:
    return any(name != "step" and not name.startswith(PREFIX) for name in row)


def _curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps), np.array([points[step] for step in steps], np.float64))


def _is_load(name: str) -> bool:
    return "/layers/" in name or name.rpartition("/")[2] in ("entropy", "largest", "least", "unused", "dropped")


def _planned(bindings: Mapping[str, str]) -> int | None:
    value = lambda text: bindings.get(text[1:], text) if text.startswith("%") else text
    whole = value(bindings.get("training.Run.steps", "None"))
    if whole.isdecimal():
        return int(whole)
    stages = [value(text) for name, text in bindings.items() if name.endswith("training.Stage.steps")]
    return sum(map(int, stages)) if stages and all(text.isdecimal() for text in stages) else None
