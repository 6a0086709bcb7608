"""A sweep's folder: what was asked, and what each arm's runs have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evaluation.comparison import Comparison, compare
from launch.report.run_folder import RunFolder
from launch.sweep.folder import read_sweep, result, run_folder
from partitioning.errors import UserError

SWEEP = "sweep.json"
NEEDED = ("metric", "budget", "seeds", "arms", "baseline")
LEVEL = 0.95

State = Literal["done", "failed", "unfinished"]


@dataclass(frozen=True)
class Trial:
    """One arm under one seed.

    Args:
      path: its folder.
      state: unfinished is what has no result.
      error: why it failed, in a line.
      figures: of its last evaluation.
      steps, tokens, flops: what was spent.
      seconds: by what they went to: start, compile, train, evaluate.
    """

    path: Path
    state: State
    error: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    steps: float = 0
    tokens: float = 0
    flops: float = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A choice of options.

    Args:
      name: of the arm.
      options: by axis.
      lines: what stood behind the base on the command line.
      trials: by seed.
    """

    name: str
    options: Mapping[str, str]
    lines: Sequence[str]
    trials: Mapping[int, Trial]

    def done(self) -> list[Trial]:
        """The trials that ended well."""
        return [trial for trial in self.trials.values() if trial.state == "done"]

    def mean(self, what: Literal["steps", "tokens", "flops"]) -> float | None:
        """What a run of this arm spent, on average; None where none has ended."""
        each = [getattr(trial, what) for trial in self.done()]
        return sum(each) / len(each) if each else None


@dataclass(frozen=True, eq=False)
class SweepFolder:
    """A sweep.

    Args:
      path: its folder.
      told: what `sweep.json` says.
      arms: in its order.
    """

    path: Path
    told: Mapping[str, Any]
    arms: Sequence[Arm]

    @classmethod
    def read(cls, path: Path) -> SweepFolder:
        """Reads a folder.

        Raises:
          UserError: no sweep's folder, a file in it that is not what it should be, or no run that has ended.
        """
        told = read_sweep(path)
        missing = [name for name in NEEDED if name not in told]
        if missing:
            raise UserError(f"{path / SWEEP}: has no {missing[0]!r}, expected what `palmette sweep` writes")
        arms = [_arm(path, arm, told["seeds"]) for arm in told["arms"]]
        if told["baseline"] not in [arm.name for arm in arms]:
            raise UserError(f"{path / SWEEP}: its baseline {told['baseline']!r} is none of its arms")
        found = cls(path, told, arms)
        if not any(arm.done() for arm in arms):
            runs = [trial for arm in arms for trial in arm.trials.values()]
            failed = sum(trial.state == "failed" for trial in runs)
            raise UserError(
                f"{path}: none of its {len(runs)} runs has ended well ({failed} failed, {len(runs) - failed} without "
                "result.json): the same `palmette sweep` goes on with it"
            )
        if not found.values():
            known = sorted({name for arm in arms for trial in arm.done() for name in trial.figures})
            raise UserError(f"{path}: no run has the figure {found.metric!r}, only {', '.join(known) or 'none at all'}")
        if not found.values().get(found.baseline):
            raise UserError(
                f"{path}: no run of the baseline {found.baseline!r} has ended well: there is nothing to compare with"
            )
        return found

    @property
    def name(self) -> str:
        """Of the sweep: its file's, or its folder's."""
        config = self.told.get("config")
        return Path(config).stem if config else self.path.resolve().name

    @property
    def metric(self) -> str:
        """The figure that the arms are judged by."""
        return self.told["metric"][0]

    @property
    def best(self) -> Literal["min", "max"]:
        """Whether its smallest or largest value is best."""
        return self.told["metric"][1]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return self.told["baseline"]

    def values(self, figure: str | None = None) -> dict[str, dict[int, float]]:
        """A figure by arm and seed, of what ended well; the metric by default."""
        figure = self.metric if figure is None else figure
        found = {
            arm.name: {s: float(t.figures[figure]) for s, t in arm.trials.items() if figure in t.figures}
            for arm in self.arms
        }
        return {name: by_seed for name, by_seed in found.items() if by_seed}

    def compared(self, figure: str | None = None) -> dict[str, Comparison]:
        """The arms beside the baseline by a figure, which is best as the metric is."""
        return compare(self.values(figure), baseline=self.baseline, best=self.best, level=LEVEL)

    @cached_property
    def figures(self) -> list[str]:
        """Every figure that some run has, the metric first."""
        names = dict.fromkeys(name for arm in self.arms for trial in arm.done() for name in trial.figures)
        return [self.metric, *(name for name in names if name != self.metric)]

    @cached_property
    def runs(self) -> dict[str, dict[int, RunFolder]]:
        """The runs that ended well, by arm and seed, as far as their metrics are there."""
        return {
            arm.name: {
                seed: RunFolder.read(trial.path, f"{arm.name}, seed {seed}")
                for seed, trial in arm.trials.items()
                if trial.state == "done" and (trial.path / "metrics.jsonl").is_file()
            }
            for arm in self.arms
        }


def is_sweep(path: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (path / SWEEP).is_file()


def _arm(path: Path, told: Mapping[str, Any], seeds: Sequence[int]) -> Arm:
    lines = (*told.get("configs", ()), *told.get("overrides", ()))
    trials = {seed: _trial(path, told["name"], seed) for seed in seeds}
    return Arm(told["name"], told.get("options", {}), lines, trials)


def _trial(path: Path, arm: str, seed: int) -> Trial:
    folder, told = run_folder(path, arm, seed), result(path, arm, seed)
    if told is None:
        return Trial(folder, "unfinished")
    if told.get("status") not in ("done", "failed"):
        raise UserError(f"{folder / 'result.json'}: status {told.get('status')!r}, expected 'done' or 'failed'")
    if told["status"] == "failed":
        return Trial(folder, "failed", told.get("error") or "no reason given")
    spent = {what: float(told.get(what) or 0) for what in ("steps", "tokens", "flops")}
    figures = {name: float(value) for name, value in (told.get("figures") or {}).items()}
    return Trial(folder, "done", None, figures, **spent, seconds=told.get("seconds") or {})
