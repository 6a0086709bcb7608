"""How a mixture's experts were used: by layer at the end of a run, and over its steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from launch.report import curves
from launch.report.numbers import number
from launch.report.parts import Figure, Section, Table, slug
from launch.report.run_folder import RunFolder

_LOAD = re.compile(r"(?P<where>.*)/(?P<tree>[^/]+/layers/\d+)/load")


def experts(runs: Sequence[RunFolder]) -> Section | None:
    """The loads of all runs that have any; None where none has."""
    parts: list[Table | Figure] = []
    for run in runs:
        loads: dict[str, dict[str, np.ndarray]] = {}
        for name, load in run.arrays.items():
            if found := _LOAD.fullmatch(name):
                loads.setdefault(found["where"], {})[found["tree"]] = load
        parts += [table for where, own in loads.items() for table in _tables(run, where, own)]
    if not parts:
        return None
    for key, words in (
        ("entropy", "evenness of experts (entropy over its largest)"),
        ("largest", "largest load over the mean"),
    ):
        names = dict.fromkeys(n for r in runs for n in r.curves if re.fullmatch(rf"\w+s/\w+/{key}", n))
        for name in names:
            series = [curves.over(run.name, run, run.curves[name]) for run in runs if name in run.curves]
            title = f"{words[:1].upper()}{words[1:]}, {name.split('/')[1]}"
            parts.append(Figure(slug(f"load {name}"), title, f"{title}. {curves.OVER}", "curves", words, series))
    told = [
        "The share of choices that fell on each expert; an even router gives each the same. 0 is an expert that no token met."
    ]
    return Section("experts", "Expert load", told, parts)


def _tables(run: RunFolder, where: str, loads: dict[str, np.ndarray]) -> list[Table]:
    most = max(len(load) for load in loads.values())
    head = ["layer", "entropy", "largest/mean", *(f"expert {i}" for i in range(most))]
    rows = []
    for layer, load in sorted(loads.items(), key=lambda item: (item[0].split("/")[0], int(item[0].rpartition("/")[2]))):
        used = load[load > 0]
        entropy = float(-(used * np.log(used)).sum() / np.log(len(load))) if len(load) > 1 else 1.0
        cells = [f"{100 * share:.1f}%" for share in load] + [""] * (most - len(load))
        rows.append([layer, number(entropy), number(float(load.max() * len(load))), *cells])
    what = "in training" if where in ("experts", "heads") or "/" not in where else f"by {where.split('/')[1]}, held out"
    caption = f"{run.name}, {what}: each layer's load by expert, at the last logged step."
    return [Table(slug(f"load {run.name} {where}"), caption, head, rows, bars=range(3, 3 + most))]
