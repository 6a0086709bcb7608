"""What a finished run left behind, as learning curves and learning rates for `evaluation`'s laws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from evaluation.curves import Curve
from partitioning.errors import UserError

Per = Literal["steps", "tokens", "flops", "seconds"]


def curve(run: Path, figure: str, *, per: Per) -> Curve:
    """A figure of a sweep's run over what it had spent.

    Args:
      run: its folder, with `metrics.jsonl` and `result.json`.
      figure: of a step (`loss`) or of an evaluation (`masked/bits_per_token`).
      per: what had been spent: steps, tokens, FLOPs, or seconds of steps and of waits for data.

    Raises:
      UserError: the run is not finished, or has no such figure.
    """
    found: dict[int, float] = {}
    known: set[str] = set()
    for line in _lines(run):
        own = {name.removeprefix("evaluation/"): value for name, value in line.items()}
        known |= own.keys()
        if figure in own and not isinstance(own[figure], list):
            found[line["step"]] = float(own[figure])
    if not found:
        raise UserError(f"{run}: no figure {figure!r} in its metrics: it has {', '.join(sorted(known - {'step'}))}")
    steps = np.array(sorted(found), np.float64)
    return Curve(_spent(run, steps, per), np.array([found[int(step)] for step in steps]))


def learning_rates(plan: Any, name: str = "learning_rate") -> Float[np.ndarray, T]:
    """The learning rate of every step of a planned run, from its schedule.

    Args:
      plan: a `training.plan.Plan`.
      name: under which it is logged.

    Raises:
      UserError: no optimizer of the run logs such a rate.
    """
    import jax
    import jax.numpy as jnp

    parts = []
    for stage in plan.stages:
        rates = lambda step, stage=stage: stage.stage.optimizer.rates(step)
        every = jax.jit(jax.vmap(rates))(jnp.arange(stage.first, stage.last))
        if name not in every:
            raise UserError(f"no learning rate {name!r}: use one of {', '.join(every)}")
        parts.append(np.broadcast_to(np.asarray(every[name], np.float64), (stage.stage.steps,)))
    return np.concatenate(parts)


def _spent(run: Path, steps: Float[np.ndarray, T], per: Per) -> Float[np.ndarray, T]:
    if per == "steps":
        return steps
    if per == "seconds":
        # Every split of the wall time is on file beside the step at which it was taken.
        seconds = {
            line["step"]: (line["goodput/step"] + line["goodput/data"]) * line["goodput/wall_s"]
            for line in _lines(run)
            if "goodput/wall_s" in line
        }
        known = np.array(sorted(seconds))
        return np.interp(steps, [0, *known], [0.0, *(seconds[step] for step in known)])
    path = run / "result.json"
    if not path.exists():
        raise UserError(f"{run}: not finished (no result.json): run its sweep to the end")
    stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
    # A step costs the same throughout a stage.
    ends = np.cumsum([0, *(stage["steps"] for stage in stages)])
    return np.interp(steps, ends, np.cumsum([0.0, *(stage[per] for stage in stages)]))


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run}: no metrics.jsonl in it, expected the folder of a run")
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue  # cut short by a kill
