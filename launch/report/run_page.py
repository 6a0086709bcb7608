"""The page of one run or several: what they reached, on what, in which time, and what they look like from inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.intervals import over_examples, over_seeds
from launch.report import curves
from launch.report.bindings import changes
from launch.report.experts import experts
from launch.report.numbers import number, spread
from launch.report.parts import Figure, Section, Series, Table, Text, slug
from launch.report.run_folder import RunFolder
from partitioning.errors import UserError
from training.goodput import KINDS


def sections(runs: Sequence[RunFolder]) -> list[Section]:
    """Everything that folders alone tell; examples come from checkpoints.

    Raises:
      UserError: runs that have no figure in common.
    """
    _check_alike(runs)
    found = [_figures(runs), _curves(runs), time(runs)]
    found += [section for section in (experts(runs),) if section is not None]
    return [*found, configuration(runs), environment(runs)]


def _check_alike(runs: Sequence[RunFolder]) -> None:
    first, *others = runs
    for run in others:
        if not first.figures.keys() & run.figures.keys():
            told = lambda one: ", ".join(sorted(one.figures)) or "none"
            raise UserError(f"{first.path} and {run.path} have no figure in common ({told(first)}; {told(run)})")


def _figures(runs: Sequence[RunFolder]) -> Section:
    names = list(dict.fromkeys(name for run in runs for name in run.figures))
    head = ["figure", *(run.name for run in runs)]
    rows = [["step", *(_state(run) for run in runs)], ["seed", *(run.seed for run in runs)]]
    rows += [[name, *(number(run.figures.get(name)) for run in runs)] for name in names]
    for axis in ("tokens", "FLOPs", "seconds"):
        rows.append([f"{axis} spent", *(number(run.total(axis)) for run in runs)])
    parts: list[Any] = [Table("last-figures", "The last figures of each run, and what they cost.", head, rows)]
    parts += [table for table in (_over_seeds(runs, names), *map(_over_examples, runs)) if table is not None]
    words = [f"{run.name} is unfinished: {_state(run)}." for run in runs if _unfinished(run)]
    if len({run.bindings.get("training.Run.objective") for run in runs}) > 1:
        words.append("The runs learn by different objectives: their losses are not the same quantity.")
    return Section("figures", "Figures", words, parts)


def _unfinished(run: RunFolder) -> bool:
    return run.steps is not None and run.step < run.steps


def _state(run: RunFolder) -> str:
    return f"{run.step:,}" + (f" of {run.steps:,}" if _unfinished(run) else "")


def _over_seeds(runs: Sequence[RunFolder], names: Sequence[str]) -> Table | None:
    """A mean and an interval for each configuration that ran under several seeds."""
    groups: list[list[RunFolder]] = []
    for run in runs:
        same = (g for g in groups if run.config and not changes(g[0].bindings, run.bindings))
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    several = [group for group in groups if len({run.seed for run in group}) > 1]
    if not several:
        return None
    rows = []
    for group in several:
        for name in names:
            values = [run.figures[name] for run in group if name in run.figures]
            if values:
                label = f"{name}, {len(values)} seeds" if len(several) == 1 else f"{name}, {group[0].name} and alike"
                rows.append([label, spread(over_seeds(values))])
    caption = "Mean and 95 % interval (Student's) over runs that differ in their seed alone."
    return Table("seeds", caption, ["figure", "mean ± half the interval"], rows)


def _over_examples(run: RunFolder) -> Table | None:
    """A mean and an interval over examples, where the run kept their scores."""
    path = run.path / "examples.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        scores = {f"{e}/{m}": np.array(v, np.float64) for e, own in told.items() for m, v in own.items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: expected {{evaluator: {{figure: [a number for each example]}}}}") from None
    rows = []
    for name, each in scores.items():
        found = over_examples(each)
        ends = f"{number(found.low)} to {number(found.high)}"
        rows.append([name, number(found.mean), ends, f"{found.count:,}"])
    caption = f"{run.name}: mean over the examples that were judged, and its 95 % bootstrap interval."
    return Table(slug(f"examples {run.name}"), caption, ["figure", "mean", "interval", "examples"], rows)


def _curves(runs: Sequence[RunFolder]) -> Section:
    found = curves.figures(runs)
    more = [
        curves.curve(name, [curves.over(run.name, run, run.curves[name]) for run in runs if name in run.curves])
        for name in ("learning_rate", "gradient_norm")
        if any(name in run.curves for run in runs)
    ]
    more = [Figure(f.name, _title(f.y), f"{_title(f.y)}. {curves.OVER}", f.kind, f.y, f.series) for f in more]
    return Section("curves", "Curves", [], [*found, *more])


def _title(words: str) -> str:
    return words[:1].upper() + words[1:]


def time(runs: Sequence[RunFolder]) -> Section:
    """Tokens and FLOPs a second, and where the wall time went."""
    timed = [run for run in runs if run.seconds]
    if not timed:
        return Section("time", "Time", ["No run has logged where its time went."])
    rows, series = [], []
    for run in timed:
        training = run.total("seconds") or 0.0
        rate = lambda what, t=training: number(what / t) if what is not None and t else "–"
        rows.append([run.name, rate(run.step), rate(run.total("tokens")), rate(run.total("FLOPs")), number(training)])
        if "tokens" in run.axes and len(run.axes["tokens"].steps) > 2:
            series.append(_speed(run))
    head = ["run", "steps a second", "tokens a second", "model FLOP/s", "seconds of training"]
    caption = "Throughput over all steps: seconds of training are those of steps and of waiting for data."
    parts: list[Any] = [Table("throughput", caption, head, rows)]
    if series:
        told = "Tokens a second between two logged steps. Chosen axis as above."
        parts.append(Figure("speed", "Throughput", told, "curves", "tokens a second", series))
    return Section("time", "Time", [], [*parts, *goodput(timed)])


def goodput(runs: Sequence[RunFolder]) -> list[Table | Figure]:
    """Where the wall time of all starts went."""
    kinds = {kind: words for kind, words in KINDS.items() if any(run.seconds[kind] > 0 for run in runs)}
    share = lambda run, kind: run.seconds[kind] / max(sum(run.seconds.values()), 1e-9)
    rows = [
        [run.name, number(sum(run.seconds.values())), *(f"{100 * share(run, kind):.1f}%" for kind in kinds)]
        for run in runs
    ]
    caption = "Goodput: the share of the wall time that went to each kind of work; lost is what restarts did again."
    bars = [Series(words, {"run": [r.name for r in runs]}, [share(r, k) for r in runs]) for k, words in kinds.items()]
    told = "Goodput: shares of each run's wall time."
    return [
        Figure("goodput", "Where the time went", told, "shares", "share of the wall time", bars),
        Table("goodput-table", caption, ["run", "wall seconds", *kinds.values()], rows),
    ]


def _speed(run: RunFolder) -> Series:
    steps = np.array([step for step in run.axes["tokens"].steps if step in set(run.axes["seconds"].steps)])
    seconds, tokens = run.spent("seconds", steps), run.spent("tokens", steps)
    # Two lines of one step, or of a clock that did not move, say nothing.
    moved = np.flatnonzero(np.diff(seconds) > 0)
    rate = np.diff(tokens)[moved] / np.diff(seconds)[moved]
    return curves.over(run.name, run, curves.Curve(steps[moved + 1], rate))


def configuration(runs: Sequence[RunFolder]) -> Section:
    """The first run's configuration, and where the others depart from it."""
    base, *others = runs
    words = [] if base.config else [f"{base.name} was started by a program: its folder has no configuration."]
    parts: list[Any] = []
    if others and base.config:
        found = [{change.name: change for change in changes(base.bindings, run.bindings, seed=True)} for run in others]
        names = sorted({name for own in found for name in own})
        rows = []
        for name in names:
            first = base.bindings.get(name, "not bound")
            cells = [own[name].other or "not bound" if name in own else first for own in found]
            rows.append([name, first, *cells])
        caption = f"Bindings in which the runs differ from {base.name}."
        head = ["binding", *(run.name for run in runs)]
        words += [] if rows else ["The runs have the same configuration."]
        parts += [Table("difference", caption, head, rows, words=range(len(head)))] if rows else []
    if base.config:
        parts.append(Text("config", f"The whole configuration of {base.name}", base.config))
    return Section("configuration", "Configuration", words, parts)


def environment(runs: Sequence[RunFolder]) -> Section:
    """Versions, devices and hosts, a row a start."""
    rows = []
    for run in runs:
        for start in run.environment:
            devices, host = start.get("devices", {}), start.get("host", {})
            memory = host.get("memory")
            versions = {"python": start.get("python"), **start.get("packages", {})}
            rows.append(
                [
                    run.name,
                    f"{start.get('step', 0):,}",
                    run.seed,
                    f"{devices.get('count', '?')} × {devices.get('kind', '?')} on {devices.get('hosts', '?')} host(s)",
                    f"{host.get('processor', '?')}, {host.get('cores', '?')} cores"
                    + (f", {memory / 2**30:.0f} GiB" if memory else ""),
                    ", ".join(f"{name} {v}" for name, v in versions.items()),
                    str(start.get("started", "?")),
                ]
            )
    head = ["run", "from step", "seed", "devices", "host", "versions", "started"]
    silent = [run.name for run in runs if not run.environment]
    words = [f"No record of its environment: {', '.join(silent)}."] if silent else []
    caption = "What each start of each run ran on."
    parts = [Table("starts", caption, head, rows, words=range(3, 7))] if rows else []
    return Section("environment", "Environment and seeds", words, parts)


def named(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = next((n for n in range(1, 20) if len({p[-n:] for p in parts}) == len(parts)), 20)
    return ["/".join(p[-depth:]) for p in parts]
