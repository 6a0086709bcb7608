"""From an arm to its plan: the configuration at the length that the budget pays for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.config import Resolved, load
from launch.sweep import folder
from launch.sweep.budgets import Budget, Cost, Flops, Seconds, Spent, scaled
from launch.sweep.description import Arm, Sweep
from partitioning.errors import UserError

WARM, MEASURED_S, LEAST = 3, 3.0, 5
"""Of a measurement: steps before it, about how long it takes, and the fewest steps in it."""


@dataclass(frozen=True, eq=False)
class Planned:
    """An arm that is ready to run.

    Args:
      arm: whose plan it is.
      plan: a `training.plan.Plan`, with the base's seed.
      operative: the configuration's text.
      cost: of a run.
      lengths: overrides by which its length follows the budget.
      took_s: seconds of planning.
    """

    arm: Arm
    plan: Any
    operative: str
    cost: Cost
    lengths: tuple[str, ...]
    took_s: float

    @property
    def digest(self) -> str:
        """The same for two arms that are the same run."""
        return digest(with_seed(self.operative, 0))


def resolve(sweep: Sweep, arm: Arm, allow_import: Sequence[str] = (), **options: Any) -> Resolved:
    """An arm's configuration; `options` are those of `load`, and `lengths` further overrides.

    Raises:
      UserError: whatever of it does not fit; the line begins with the arm's name.
    """
    lengths = options.pop("lengths", ())
    with named(arm):
        return load([sweep.base, *arm.configs], [*arm.overrides, *lengths], allow_import=allow_import, **options)


@contextmanager
def named(arm: Arm) -> Iterator[None]:
    """Says of which arm an error is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from None


def fingerprint(resolved: Resolved) -> str:
    """The same for configurations of the same bindings, wherever they stand; nothing is built for it."""
    return digest(json.dumps(sorted((bind.name, bind.value) for bind in resolved.bindings)))


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def planned(sweep: Sweep, arm: Arm, out: Path | None, allow_import: Sequence[str] = ()) -> Planned:
    """Plans an arm; what the budget pays for is worked out, or measured, once, and kept in the arm's folder.

    Args:
      sweep: whose arm it is.
      arm: to plan.
      out: the sweep's folder; None keeps nothing.
      allow_import: as in `load`.

    Raises:
      UserError: what of the configuration does not fit, or the folder's arm was begun with another one.
    """
    began = time.perf_counter()
    first = resolve(sweep, arm, allow_import)
    with named(arm):
        print_ = fingerprint(first)
        with folder.locked(out, arm) if out is not None else folder.unlocked() as record:
            known = record.read(print_)
            if known is None:
                cost = cost_of(first.value.plan(), sweep.budget)
                lengths = scaled(first.bindings, sweep.budget.share(cost))
            else:
                lengths = known["lengths"]
            plans: list[Any] = []
            final = resolve(
                sweep, arm, allow_import, lengths=lengths, exercise=lambda run: plans.append(run.abstract())
            )
            cost = cost_of(plans[0])
            if known is None:
                record.write({"bindings": print_, "lengths": lengths, "cost": asdict(cost)})
    return Planned(arm, plans[0], final.operative, cost, tuple(lengths), time.perf_counter() - began)


def cost_of(plan: Any, budget: Budget | None = None) -> Cost:
    """What a planned run costs.

    Args:
      plan: a `training.plan.Plan`.
      budget: what is asked for: its FLOPs or its time are worked out where it is one of these; None works out its FLOPs.

    Raises:
      UserError: a budget of FLOPs, and a step whose FLOPs are not known.
    """
    from training.flops import FlopCount
    from training.loop import step_flops

    stages = []
    for stage in plan.stages:
        # Counting traces the whole step: not for a budget that does not ask.
        found = FlopCount(0.0)
        if budget is None or isinstance(budget, Flops):
            found = plan.once(("flops", stage.first), lambda stage=stage: step_flops(plan, stage))
        if isinstance(budget, Flops) and found.unbounded:
            raise UserError(
                f"the FLOPs of its step are not known ({', '.join(found.unbounded)} loop as long as the data say): use a "
                "budget of Tokens or Seconds"
            )
        places = [leaf.size for name, leaf in stage.batch.items() if name.rpartition("/")[2] == "segments"]
        steps = stage.stage.steps
        stages.append(Spent(steps, steps * sum(places), steps * found.flops))
    seconds = None
    if isinstance(budget, Seconds):
        seconds = sum(stage.stage.steps * step_seconds(plan, stage) for stage in plan.stages)
    return Cost(tuple(stages), seconds)


def step_seconds(plan: Any, stage: Any) -> float:
    """Seconds of a stage's step, reading its batch included, after compilation."""
    import jax

    program, state = plan.compile(stage), plan.init()

    def take(step: int, state: Any) -> Any:
        part = stage.stage
        batch = stage.reader.batch(
            step, batch_size=part.batch_size, length=part.length, seed=plan.run.seed, control=stage.control
        )
        return program(state, plan.put(stage, batch))[0]

    with plan.placement.scope():
        for step in range(WARM):
            state = take(step, state)
        jax.block_until_ready(state)
        began, steps = time.perf_counter(), 0
        while steps < LEAST or time.perf_counter() - began < MEASURED_S:
            state = jax.block_until_ready(take(WARM + steps, state))
            steps += 1
        return (time.perf_counter() - began) / steps


def with_seed(operative: str, seed: int) -> str:
    """A configuration's text with another seed of the run."""
    lines = operative.split("\n")
    places = [i for i, line in enumerate(lines) if line.startswith("training.Run.seed = ")]
    assert len(places) == 1, "every default is spelled out, once"
    lines[places[0]] = f"training.Run.seed = {seed}"
    return "\n".join(lines)
