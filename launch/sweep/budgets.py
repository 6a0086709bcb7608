"""What all arms of a sweep may spend, and the steps that each gets for it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from launch.config import Shown
from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields

Count = Annotated[float, Range(1, 1e30)]
STEPS = ("steps", "_steps")


@dataclass(frozen=True)
class Spent:
    """What a stage costs.

    Args:
      steps: optimizer steps.
      tokens: places for tokens in all batches, padding included.
      flops: of the model, as `training.flops` counts them.
    """

    steps: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Cost:
    """What a run of a configuration costs.

    Args:
      stages: in order.
      seconds: of all steps, as measured; None where nothing was.
    """

    stages: tuple[Spent, ...]
    seconds: float | None = None

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Of all stages."""
        return sum(stage.flops for stage in self.stages)


@dataclass(frozen=True)
class Tokens:
    """Every arm reads as many tokens.

    Args:
      amount: tokens of a run; places in its rows, padding included.
    """

    amount: Count
    kind: ClassVar[str] = "tokens"

    def __post_init__(self):
        check_fields(self)

    def share(self, cost: Cost) -> float:
        """How many times such a run the budget pays for."""
        return self.amount / cost.tokens


@dataclass(frozen=True)
class Flops:
    """Every arm does as much work, as `training.flops` counts the arm's own step.

    Args:
      amount: FLOPs of a run.
    """

    amount: Count
    kind: ClassVar[str] = "flops"

    def __post_init__(self):
        check_fields(self)

    def share(self, cost: Cost) -> float:
        """How many times such a run the budget pays for."""
        return self.amount / cost.flops


@dataclass(frozen=True)
class Seconds:
    """Every arm trains as long, by the time of the arm's own step, measured once after compilation.

    Args:
      amount: seconds of a run's steps, without its start, compilation and evaluation.
    """

    amount: Count
    kind: ClassVar[str] = "time"

    def __post_init__(self):
        check_fields(self)

    def share(self, cost: Cost) -> float:
        """How many times such a run the budget pays for."""
        assert cost.seconds is not None
        return self.amount / cost.seconds


Budget = Tokens | Flops | Seconds


def scaled(bindings: Sequence[Shown], share: float) -> list[str]:
    """Overrides under which a run is `share` times as long, its schedules with it.

    A configuration's lengths are macros: `steps`, and those whose names end in `_steps`. All of them are multiplied, and
    every number of steps that is bound must be one of them. Any other macro stays: `warmup = 10`.

    Args:
      bindings: of the configuration.
      share: what to multiply with.

    Raises:
      UserError: a number of steps that would not follow, or no macro that does.
    """
    for bind in bindings:
        argument = bind.name.rpartition(".")[2]
        if "." in bind.name and argument.endswith(STEPS) and _whole(bind.value):
            scope = "_".join(bind.name.split("/")[:-1])
            macro = f"{scope}_{argument}" if scope else argument
            raise UserError(
                f"{bind.where}: {bind.name} = {bind.value} would not follow the sweep's budget: bind it to a macro, "
                f"`{macro} = {bind.value}` and `{bind.name} = %{macro}` (a macro of another name, such as `warmup`, stays)"
            )
    macros = {bind.name: _whole(bind.value) for bind in bindings if "." not in bind.name}
    lengths = {name: value for name, value in macros.items() if value and name.endswith(STEPS)}
    if not lengths:
        raise UserError(
            "no macro says how long the run is, and a budget needs one: `steps = 1_000` and `training.Run.steps = %steps`"
        )
    return [f"{name} = {max(1, round(value * share))}" for name, value in lengths.items()]


def _whole(text: str) -> int:
    """The whole number above 0 that a binding's value is, else 0."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return 0
    return value if type(value) is int and value > 0 else 0
