"""The page of a sweep: its arms beside the baseline, with what each cost and what is noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.comparison import Comparison
from evaluation.curves import Curve as Spending
from evaluation.curves import shared
from launch.report import curves
from launch.report.bindings import changes
from launch.report.numbers import bounds, number, probability, spread
from launch.report.parts import Figure, Section, Series, Table, Text, slug
from launch.report.run_folder import JUDGED, RunFolder
from launch.report.run_page import environment
from launch.report.sweep_folder import SweepFolder
from partitioning.errors import UserError

MARKS = {"better": "▲ better", "worse": "▼ worse", "within noise": "◇ within noise"}
BUDGETS = {"tokens": "tokens", "flops": "FLOPs", "time": "seconds"}
SHARES = (0.25, 0.5, 0.75, 1.0)
SPENT = {
    "start": "start",
    "compile": "compilation",
    "train": "training",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "lost": "lost to restarts",
}


def sections(sweep: SweepFolder) -> list[Section]:
    """All of the page."""
    return [_arms(sweep), _others(sweep), _curves(sweep), _time(sweep), _configuration(sweep), _environment(sweep)]


def question(sweep: SweepFolder) -> list[str]:
    """What was asked, in sentences."""
    told = sweep.told
    budget = told["budget"]
    kind = BUDGETS.get(budget["kind"], budget["kind"])
    best = "smallest" if sweep.best == "min" else "largest"
    found = [told["question"]] if told.get("question") else []
    if told.get("claim"):
        found.append(f"The claim: {told['claim']}" + (f" ({told['source']})" if told.get("source") else ""))
    found.append(
        f"{len(sweep.arms)} arms, {len(told['seeds'])} seed(s) each, at equal {kind}: {number(float(budget['amount']))}. "
        f"Judged by {sweep.metric}, of which the {best} is best; the baseline is {sweep.baseline}."
    )
    return found


def _arms(sweep: SweepFolder) -> Section:
    compared = sweep.compared()
    rows = []
    for arm in sweep.arms:
        found = compared.get(arm.name)
        count = f"{len(arm.done())} of {len(arm.trials)}"
        spent = [number(arm.mean("tokens")), number(arm.mean("flops")), number(arm.mean("steps"))]
        rows.append([arm.name, *_cells(found, arm.name == sweep.baseline), count, *spent])
    head = ["arm", sweep.metric, "difference", "p (Holm)", "finding", "runs", "tokens", "FLOPs", "steps"]
    several = sum(found.difference is not None for found in compared.values())
    caption = (
        f"Each arm's mean ± half its 95 % interval (Student's, over seeds), and its difference from {sweep.baseline} paired by "
        f"seed, with an interval that holds for all {several} differences at once (Bonferroni's); p of the paired t-test, "
        "corrected by Holm. The finding goes by the interval, the stricter of the two: one that holds 0 is noise. Tokens and FLOPs "
        "are those of a run as the sweep counts them, padding included."
    )
    parts: list[Any] = [Table("comparison", caption, head, rows, words=[4]), _means(sweep, compared)]
    ended = [(arm, seed, trial) for arm in sweep.arms for seed, trial in arm.trials.items()]
    bad = [
        [arm.name, str(seed), trial.state, trial.error or "no result yet"]
        for arm, seed, trial in ended
        if trial.state != "done"
    ]
    if bad:
        told = "Runs that are not in any figure of this page."
        parts.append(Table("missing", told, ["arm", "seed", "state", "why"], bad, words=[2, 3]))
    words = question(sweep)
    if several and len(sweep.told["seeds"]) < 2:
        words.append("One seed says nothing of noise: no difference here is more than a hint.")
    return Section("arms", "Arms", words, parts)


def _cells(found: Comparison | None, baseline: bool) -> list[str]:
    if found is None:
        return ["–", "–", "–", "no run has ended"]
    if baseline:
        return [spread(found.mean), "–", "–", "● baseline"]
    difference = "–" if found.difference is None else bounds(found.difference)
    return [spread(found.mean), difference, probability(found.p), MARKS[found.effect]]


def _means(sweep: SweepFolder, compared: dict[str, Comparison]) -> Figure:
    series = []
    for effect, label in {"": "● baseline", **MARKS}.items():
        own = {
            n: c for n, c in compared.items() if (effect == "") == (n == sweep.baseline) and effect in ("", c.effect)
        }
        if own:
            means = [c.mean for c in own.values()]
            finite = lambda end, mean: end if abs(end) != float("inf") else mean
            low, high = ([finite(getattr(m, end), m.mean) for m in means] for end in ("low", "high"))
            series.append(Series(label, {"arm": list(own)}, [m.mean for m in means], low, high))
    title = f"{sweep.metric} by arm"
    told = f"{title}: means and 95 % intervals over seeds. The line is the baseline's mean."
    line = compared[sweep.baseline].mean.mean
    return Figure("means", title, told, "intervals", sweep.metric, series, line, list(compared))


def _others(sweep: SweepFolder) -> Section:
    """Every other figure, without a finding: the sweep asks about one."""
    parts = []
    for name in sweep.figures[1:]:
        values = sweep.values(name)
        if sweep.baseline not in values:
            continue
        compared = sweep.compared(name)
        rows = []
        for arm, found in compared.items():
            difference = "–" if found.difference is None else bounds(found.difference)
            rows.append([arm, spread(found.mean), difference])
        caption = f"{name}: mean ± half its 95 % interval, and the difference from {sweep.baseline}."
        parts.append(Table(slug(f"other {name}"), caption, ["arm", name, "difference"], rows))
    words = [f"The sweep asks about {sweep.metric}; these are looked at beside it, and no finding is drawn from them."]
    return Section("others", "Other figures", words if parts else ["No run has another figure."], parts)


def _curves(sweep: SweepFolder) -> Section:
    runs = [run for by_seed in sweep.runs.values() for run in by_seed.values()]
    if not runs:
        return Section("curves", "Curves", ["No run has left its metrics."])
    parts: list[Any] = []
    for name in ["loss", *curves.judged(runs)]:
        found = [curves.mean(arm, by_seed.values(), name) for arm, by_seed in sweep.runs.items()]
        series = [one for one in found if one is not None]
        if series:
            parts.append(curves.curve(name.removeprefix(JUDGED), series))
    words = ["Each curve is the mean of an arm's seeds, at the steps that all of them logged."]
    equal = _equal(sweep)
    return Section("curves", "Curves", words, [*([equal] if equal else []), *parts])


def _equal(sweep: SweepFolder) -> Table | None:
    """The metric, or the loss where the metric was judged only once, at shares of the budget that all arms have spent."""
    axis = BUDGETS[sweep.told["budget"]["kind"]]
    for name in (f"{JUDGED}{sweep.metric}", "loss"):
        found: dict[str, Spending] = {}
        for arm, by_seed in sweep.runs.items():
            series = curves.mean(arm, by_seed.values(), name)
            if series is not None and axis in series.x and len(series.y) > 1:
                spent = np.array(series.x[axis], np.float64)
                rising = np.concatenate([[True], np.diff(spent) > 0])
                found[arm] = Spending(spent[rising], np.array(series.y)[rising])
        if len(found) < 2:
            continue
        try:
            points, values = shared(list(found.values()), count=2)
        except UserError:
            continue
        at = np.array([share * points[-1] for share in SHARES])
        values = np.stack([one.at(at) for one in found.values()])
        told = name.removeprefix(JUDGED)
        rows = [[arm, *map(number, map(float, row))] for arm, row in zip(found, values, strict=True)]
        head = ["arm", *(f"at {number(float(x))} {axis}" for x in at)]
        caption = (
            f"{told} at equal {axis}, means over seeds, linear between logged steps, never beyond them: "
            "25, 50, 75 and 100 % of what every arm has spent."
        )
        return Table("equal", caption, head, rows)
    return None


def _time(sweep: SweepFolder) -> Section:
    rows, means = [], {}
    for arm in sweep.arms:
        done = [trial.seconds for trial in arm.done() if trial.seconds]
        if done:
            means[arm.name] = {kind: sum(float(s.get(kind, 0)) for s in done) / len(done) for kind in SPENT}
    kinds = {kind: words for kind, words in SPENT.items() if any(own[kind] > 0 for own in means.values())}
    for name, own in means.items():
        whole = max(sum(own.values()), 1e-9)
        arm = next(arm for arm in sweep.arms if arm.name == name)
        speed = (arm.mean("tokens") or 0.0) / own["train"] if own["train"] else None
        rows.append([name, number(whole), *(f"{100 * own[kind] / whole:.1f}%" for kind in kinds), number(speed)])
    if not rows:
        return Section("time", "Time", ["No run has said where its time went."])
    head = ["arm", "seconds a run", *kinds.values(), "tokens a second of training"]
    caption = "Where the time of an arm's runs went, on average over seeds."
    bars = [
        Series(words, {"run": list(means)}, [own[kind] / max(sum(own.values()), 1e-9) for own in means.values()])
        for kind, words in kinds.items()
    ]
    told = "Shares of the time of an arm's runs."
    figure = Figure("goodput", "Where the time went", told, "shares", "share of the time", bars)
    return Section("time", "Time", [], [figure, Table("time-split", caption, head, rows)])


def _configuration(sweep: SweepFolder) -> Section:
    axes = [axis["name"] for axis in sweep.told.get("axes", [])]
    rows = [
        [arm.name, *(arm.options.get(axis, "–") for axis in axes), "; ".join(arm.lines) or "as the base"]
        for arm in sweep.arms
    ]
    head = ["arm", *axes, "behind the base on the command line"]
    caption = f"What each arm adds to the base, {sweep.told.get('base', 'its configuration')}."
    parts: list[Any] = [Table("options", caption, head, rows, words=range(len(head)))]
    firsts = {arm: next(iter(by_seed.values())) for arm, by_seed in sweep.runs.items() if by_seed}
    base = firsts.get(sweep.baseline)
    if base is not None and base.config:
        found = [
            [arm, c.name, c.base or "not bound", c.other or "not bound"]
            for arm, run in firsts.items()
            for c in _beside(base, run)
        ]
        if found:
            told = f"Every binding that differs from {sweep.baseline}'s, as resolved, lengths that follow the budget included."
            parts.append(
                Table("difference", told, ["arm", "binding", sweep.baseline, "this arm"], found, words=range(4))
            )
        parts.append(Text("config", f"The whole configuration of {sweep.baseline}, seed {base.seed}", base.config))
    return Section("configuration", "Configuration", [], parts)


def _beside(base: RunFolder, run: RunFolder) -> list[Any]:
    return changes(base.bindings, run.bindings) if run is not base and run.config else []


def _environment(sweep: SweepFolder) -> Section:
    """The starts of all runs, each machine once."""
    runs: Sequence[RunFolder] = [run for by_seed in sweep.runs.values() for run in by_seed.values()]
    kinds: dict[str, RunFolder] = {}
    for run in runs:
        for start in run.environment:
            kinds.setdefault(repr([start.get(key) for key in ("python", "packages", "devices", "host")]), run)
    seeds = ", ".join(map(str, sweep.told["seeds"]))
    if not kinds:
        return Section(
            "environment", "Environment and seeds", [f"Seeds: {seeds}. No run has a record of its environment."]
        )
    found = environment(list({run.path: run for run in kinds.values()}.values()))
    words = [f"Seeds: {seeds}. {len(runs)} runs on {len(kinds)} kind(s) of machine; the first run on each is shown."]
    return Section(found.name, found.title, words, found.parts)
