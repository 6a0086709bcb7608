"""Evaluators at work: during a run, and on what a run left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from checkpoints.folder import checkpoints_in
from models.loads import Loads, named
from partitioning import UserError
from partitioning import data as data_parallel
from training.description import columns
from training.plan import Plan
from training.state import State
from training.store import Store

Figures = Mapping[str, float | Loads]
Judge = Callable[[Mapping[str, Any]], Figures]


def open_judges(plan: Plan) -> list[Judge]:
    """The run's evaluators, ready for its models."""
    return [
        evaluator.open(models=plan.trees.models, placement=plan.placement, tokenizer=plan.tokenizer)
        for evaluator in plan.run.evaluators
    ]


def judged(
    judges: Sequence[Judge], values: Mapping[str, Any], examples: dict[str, Any] | None = None
) -> dict[str, float | Loads]:
    """All judges' figures, and loads of experts by the judge's name.

    Args:
      judges: from `open_judges`.
      values: the leaves under `params`, `frozen` and `buffers`.
      examples: takes the figures of each example, where a judge has them (as `examples` of what it returns).

    Raises:
      UserError: two evaluators give a figure of the same name.
    """
    figures: dict[str, float | Loads] = {}
    for judge in judges:
        own = judge(values)
        if examples is not None:
            examples |= getattr(own, "examples", {})
        for name, value in own.items():
            if name in figures:
                raise UserError(f"two evaluators give the figure {name!r}: give one of them another `name`")
            figures[name] = value
    return figures


def values_of(plan: Plan, state: State) -> dict[str, Any]:
    """What is judged of a state: the averaged parameters where there are any."""
    params = state.params
    if state.average is not None and plan.run.average is not None:
        params = plan.run.average.read(state.average, state.params)
    return {"params": params, "frozen": state.frozen, "buffers": state.buffers}


def arrays(figures: Figures) -> dict[str, Any]:
    """Figures as numbers and arrays by name."""
    out: dict[str, Any] = {}
    for name, value in figures.items():
        out |= {f"{name}/{k}": v for k, v in value.figures().items()} if isinstance(value, Loads) else {name: value}
    return out


def numbers(figures: Figures) -> dict[str, float]:
    """Figures that are one number, by name."""
    return {name: value for name, value in arrays(figures).items() if isinstance(value, float)}


def write_examples(path: Path, examples: Mapping[str, Any]) -> None:
    """Writes `{evaluator: {figure: [a number for each example]}}`, six digits a number.

    Raises:
      UserError: it cannot be written.
    """
    nested: dict[str, dict[str, list[float]]] = {}
    for name, each in examples.items():
        evaluator, _, figure = name.rpartition("/")
        nested.setdefault(evaluator, {})[figure] = [float(f"{number:.6g}") for number in each]
    try:
        path.write_text(json.dumps(nested) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def lines(found: Figures) -> list[str]:
    """Figures as aligned lines; `x/unigram` stands beside `x`, which it is to be compared with. Loads are tables, with a line
    for each layer that has experts which nothing chose."""
    figures = {name: value for name, value in found.items() if not isinstance(value, Loads)}
    baselines = {name for name in figures if name.rpartition("/")[0] in figures}
    width = max((len(name) for name in figures if name not in baselines), default=0)
    out = []
    for name, value in figures.items():
        if name in baselines:
            continue
        beside = [(other.rpartition("/")[2], figures[other]) for other in baselines if other.rpartition("/")[0] == name]
        words = "".join(f"   {label} {number:8.4f}" for label, number in sorted(beside))
        out.append(f"{name:{width}}  {value:8.4f}{words}")
    for name, loads in found.items():
        if isinstance(loads, Loads):
            out += [f"{name}  {line}" for line in columns(loads.table())]
            dead = [named(load.tally.of, layer, load.unused) for layer, load in loads.layers.items() if load.unused]
            out += [f"{name}: {words}: no token in all that was read" for words in dead]
    return out


def evaluate(plan: Plan, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the evaluators on a run's newest complete checkpoint.

    Args:
      plan: of the run.
      out: its folder.
      say: takes a line to print.

    Returns:
      Figures by name, numbers and arrays.

    Raises:
      UserError: no evaluators, or no complete checkpoint of this run.
    """
    if not plan.run.evaluators:
        raise UserError(
            f"{out}: its config has no evaluators: bind training.Run.evaluators, and train or resume with it"
        )
    step, values = Store(plan, checkpoints_in(out)).values()
    say(f"{out}: checkpoint of step {step}" + (", averaged parameters" if plan.run.average is not None else ""))
    figures = judged(open_judges(plan), values)
    for line in lines(figures):
        say(line)
    return arrays(figures)


def restored(run: Any, out: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan of a run on one device, whatever mesh it was trained on, and its newest complete checkpoint's leaves.

    Args:
      run: the run.
      out: its folder.

    Returns:
      The plan, and the leaves under `params` (averaged where the run averages), `frozen` and `buffers`.

    Raises:
      UserError: no complete checkpoint of this run.
    """
    plan = replace(run, rules=data_parallel()).plan(jax.local_devices()[:1])
    _, values = Store(plan, checkpoints_in(out)).values()
    return plan, values


def restore(run: Any, out: Path) -> tuple[Any, Any]:
    """The trunk of a run's newest complete checkpoint, on one device, and its tokenizer; see `restored`."""
    plan, values = restored(run, out)
    return plan.trees.models(**values).module("trunk"), plan.tokenizer
