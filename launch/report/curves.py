"""Figures over what was spent: the curves of runs, and of a sweep's arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from launch.report.parts import Figure, Series, slug
from launch.report.run_folder import AXES, JUDGED, Curve, RunFolder

MOST = 1000
"""Points of a curve; of longer ones every so manieth is drawn."""
OVER = (
    "Over steps, tokens (without padding), FLOPs or seconds of training (steps and waiting for data), as chosen above."
)


def judged(runs: Sequence[RunFolder]) -> list[str]:
    """The evaluators' figures of some runs, without loads and without those that stand beside another."""
    names = dict.fromkeys(f"{JUDGED}{name}" for run in runs for name in run.figures if name != "loss")
    return [name for name in names if name.rpartition("/")[0] not in names]


def figures(runs: Sequence[RunFolder]) -> list[Figure]:
    """The loss and each evaluator's figure, every run a curve."""
    found = []
    for name in ["loss", *judged(runs)]:
        having = [run for run in runs if name in run.curves]
        series = [over(run.name, run, run.curves[name]) for run in having]
        series += _beside(name, having)
        if series:
            found.append(curve(name.removeprefix(JUDGED), series))
    return found


def curve(name: str, series: Sequence[Series]) -> Figure:
    """A figure of curves, of the training's loss or of an evaluator's figure."""
    what = "Loss of training" if name == "loss" else f"Held out: {name}"
    unit = name.rpartition("/")[2].replace("_", " ")
    return Figure(slug(f"curve {name}"), what, f"{what}. {OVER}", "curves", unit, series)


def over(name: str, run: RunFolder, points: Curve) -> Series:
    """A run's figure over every axis that the run has a record of."""
    thin = thinned(len(points.steps))
    steps = points.steps[thin]
    x: dict[str, list[float]] = {"steps": steps.tolist()}
    x |= {axis: run.spent(axis, steps).tolist() for axis in AXES if axis in run.axes}
    return Series(name, x, points.values[thin].tolist())


def thinned(count: int) -> np.ndarray:
    """Numbers of the points that are drawn, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int))


def mean(name: str, runs: Iterable[RunFolder], figure: str) -> Series | None:
    """The mean over seeds at the steps that all of them have logged, over what they had spent there on average."""
    having = [run for run in runs if figure in run.curves]
    if not having:
        return None
    shared = having[0].curves[figure].steps
    for run in having[1:]:
        shared = np.intersect1d(shared, run.curves[figure].steps)
    if not len(shared):
        return None
    shared = shared[thinned(len(shared))]
    axes = [axis for axis in AXES if all(axis in run.axes for run in having)]
    at = lambda points: points.values[np.searchsorted(points.steps, shared)]
    x: dict[str, list[float]] = {"steps": shared.tolist()}
    x |= {axis: np.mean([run.spent(axis, shared) for run in having], axis=0).tolist() for axis in axes}
    return Series(name, x, np.mean([at(run.curves[figure]) for run in having], axis=0).tolist())


def _beside(name: str, runs: Sequence[RunFolder]) -> list[Series]:
    """What the figure is to be compared with (`x/unigram` beside `x`), once where it is the same for all runs."""
    found: dict[tuple[str, float], Series] = {}
    for run in runs:
        others: Mapping[str, Curve] = {k: v for k, v in run.curves.items() if k.rpartition("/")[0] == name}
        for other, points in others.items():
            label = other.rpartition("/")[2]
            key = (label, round(float(points.values[-1]), 6))
            series = over(label, run, points)
            found.setdefault(key, Series(label, series.x, series.y, steady=True))
    return list(found.values())
