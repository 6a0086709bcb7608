"""What a sweep is: a base, what changes, how often, for how much, and what is asked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from launch.names import nearest
from launch.sweep.budgets import Budget
from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields

NAME = re.compile(r"[^\W_][\w.+\- ]*", re.ASCII)
Seed = Annotated[int, Range(0, (1 << 32) - 1)]
Line = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """An axis of named options; each is what one would write behind the base on the command line.

    Args:
      name: of the axis.
      options: for each option's name one or several overrides (`'RandomTokens.rate = 0.4'`) and configurations
        (`'configs/parts/deep.gin'`). An empty list is the base as it is.

    Raises:
      UserError: no options, or a name that cannot be part of a folder's.
    """

    name: str
    options: Mapping[str, Line]

    def __post_init__(self):
        check_fields(self)
        if not self.options:
            raise UserError(f"the axis {self.name!r} has no options")
        for name in (self.name, *self.options):
            if not NAME.fullmatch(name):
                raise UserError(
                    f"{name!r} names a folder: expected letters, digits and `_.+- `, the first a letter or a digit"
                )

    def lines(self, option: str) -> list[str]:
        """What an option adds to the command line."""
        found = self.options[option]
        return [found] if isinstance(found, str) else list(found)


@dataclass(frozen=True, kw_only=True)
class Values:
    """An axis of values of one binding.

    Args:
      binding: such as `'objectives.RandomTokens.rate'`.
      values: numbers, strings, True and False, None, or lists of such.
      name: of the axis; None for the binding's last part.

    Raises:
      UserError: no values, or two that are the same.
    """

    binding: str
    values: Sequence[Any]
    name: str | None = None

    def axis(self) -> Options:
        """The same as named options."""
        options = {_plain(value): f"{self.binding} = {value!r}" for value in self.values}
        if len(options) < len(self.values):
            raise UserError(f"the values of {self.binding} have one twice: {list(self.values)}")
        return Options(name=self.name or self.binding.rpartition(".")[2], options=options)


def _plain(value: Any) -> str:
    """A value as a folder's name."""
    return re.sub(r"[^\w.+\-]+", "_", str(value)).strip("_")


@dataclass(frozen=True)
class Arm:
    """One choice of options, run with every seed.

    Args:
      name: `axis=option,axis=option`; a folder.
      options: the option of each axis.
      overrides, configs: what stands behind the base on the command line.
    """

    name: str
    options: Mapping[str, str]
    overrides: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep of runs that differ in what its axes say, and in their seeds.

    Args:
      base: the gin file of a run.
      axes: what changes.
      paired: the axes go in step, the first option of each with the first of the others; otherwise every combination.
      seeds: of the runs of each arm.
      budget: what every arm may spend.
      metric: a figure of the evaluators (or 'loss', of the last batch) and whether its smallest or largest value is best.
      baseline: the arm that the others are compared with; None for the first.
      question, claim, source: what is asked, what a paper says of it, and which.
      expected: of arms by name, whether the claim has them better or worse than the baseline.

    Raises:
      UserError: no axes or seeds, axes of one name, pairs that are not as many, or an arm that is none.
    """

    base: str
    axes: Sequence[Options | Values] = ()
    paired: bool = False
    seeds: Sequence[Seed] = (0, 1, 2, 3, 4)
    budget: Budget
    metric: tuple[str, Literal["min", "max"]]
    baseline: str | None = None
    question: str = ""
    claim: str = ""
    source: str = ""
    expected: Mapping[str, Literal["better", "worse"]] = field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)
        if not self.axes:
            raise UserError("a sweep without axes changes nothing: bind launch.sweep.Sweep.axes")
        if not self.seeds:
            raise UserError("a sweep without seeds runs nothing: such as launch.sweep.Sweep.seeds = [0, 1, 2, 3, 4]")
        if len({*self.seeds}) < len(self.seeds):
            raise UserError(f"seeds = {list(self.seeds)}: one stands twice")
        names = [axis.name for axis in self.named()]
        if len({*names}) < len(names):
            raise UserError(f"two axes have one name ({', '.join(names)}): give each its own")
        arms = [arm.name for arm in self.arms()]
        for name in (*([] if self.baseline is None else [self.baseline]), *self.expected):
            if name not in arms:
                what = "baseline" if name == self.baseline else "expected"
                raise UserError(f"{what}: there is no arm {name!r}: use one of {', '.join(arms)}{nearest(name, arms)}")

    def named(self) -> list[Options]:
        """The axes as named options."""
        return [axis.axis() if isinstance(axis, Values) else axis for axis in self.axes]

    def arms(self) -> list[Arm]:
        """Every choice of options.

        Raises:
          UserError: paired axes of different lengths.
        """
        axes = self.named()
        if self.paired and len({len(axis.options) for axis in axes}) > 1:
            sizes = ", ".join(f"{axis.name} has {len(axis.options)}" for axis in axes)
            raise UserError(f"paired axes go in step and need as many options each: {sizes}")
        choices = (zip if self.paired else itertools.product)(*(axis.options for axis in axes))
        found = []
        for choice in choices:
            options = {axis.name: option for axis, option in zip(axes, choice, strict=True)}
            lines = [line for axis, option in zip(axes, choice, strict=True) for line in axis.lines(option)]
            configs = tuple(line for line in lines if is_file(line))
            overrides = tuple(line for line in lines if not is_file(line))
            found.append(Arm(",".join(f"{k}={v}" for k, v in options.items()), options, overrides, configs))
        return found

    @property
    def first(self) -> str:
        """The baseline's name."""
        return self.arms()[0].name if self.baseline is None else self.baseline


def is_file(line: str) -> bool:
    """Whether a word of the command line is a configuration and not an override."""
    return line.endswith(".gin") and "=" not in line
