"""A run: everything that a config says, as one frozen dataclass."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from checkpoints.folder import place
from models.loads import Loads
from models.trunk import Trunk
from objectives.base import Objective
from objectives.controller import Controller
from partitioning import Rules, UserError
from partitioning import data as data_parallel
from partitioning.ranges import Range, check_fields
from training.boards import Boards
from training.ema import Ema
from training.guard import Guard
from training.optimizers import Optimizer
from training.tensorboard import TensorBoard

Whole = Annotated[int, Range(1, 1 << 40)]


class Data(Protocol):
    """What a config hands over as data: it opens to a reader (`data.reader.Reader`) and knows how to prepare itself."""

    def open(self) -> Any:
        """The reader."""


class Evaluator(Protocol):
    """Judges a run's models; `evaluation` has them, and a config hands them over."""

    def open(
        self, *, models: Any, placement: Any, tokenizer: Any
    ) -> Callable[[Mapping[str, Any]], Mapping[str, float | Loads]]:
        """Readies it for a run: a function from the leaves under `params`, `frozen` and `buffers` to figures by name, and to
        the loads of experts.

        Args:
          models: `Trees.models`, the modules around such leaves; called inside jit.
          placement: the run's mesh and rules.
          tokenizer: of the run's data.
        """


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with its own shapes and objective; compiled once.

    Args:
      steps: optimizer steps in this stage.
      length, batch_size, accumulate, objective, data, optimizer: as in `Run`, whose value stands where this is None. An
        optimizer must keep the state's structure.
    """

    steps: Whole
    length: Whole | None = None
    batch_size: Whole | None = None
    accumulate: Whole | None = None
    objective: Objective | None = None
    data: Any = None
    optimizer: Optimizer | None = None

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A stage with every value filled in; the fields are `Stage`'s."""

    steps: int
    length: int
    batch_size: int
    accumulate: int
    objective: Objective
    data: Any
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Args:
      model: makes the trunk; called with the vocabulary and `rngs`.
      data: what is read.
      objective: what is learned.
      steps: optimizer steps, where there are no `stages`.
      batch_size: rows in a step, all devices and micro-batches together.
      length: tokens in a row.
      accumulate: micro-batches in a step.
      stages: parts of the run, one after the other; replaces `steps`.
      optimizer: a rule for gradients.
      rules: where parameters and activations live; data parallel by default.
      seed: of the initial weights, the order of the data and every draw.
      clip: largest global norm of a gradient; None for no limit.
      guard: skips bad steps and ends a run of them; None trains on through NaN.
      average: exponential moving average of the parameters; None for none. Evaluation uses it where there is one.
      init_from: a run's folder, whose newest trunk is the initial trunk, or a model's in the Hugging Face layout. What
        it gave, and what it had that the trunk has not, is printed and kept in `init_from.json`. A run's dense layer gives
        its matrices to every expert (see `models.upcycle`).
      reinitialise: regular expressions over the trunk's parameter paths, layers by index (`stack/layers/3/`); those that
        match begin as without `init_from`: a new head, a larger table. All others must be there, of the same shape.
      freeze: regular expressions over the trunk's parameter paths; those that match are not trained. Layers that are
        scanned have one path: `models.Trunk.scan = False` gives each its own.
      evaluators: called every `evaluate_every` steps and at the end.
      controllers: called every so many steps with reduced statistics.
      boards: where people look at figures, beside `metrics.jsonl`; None for TensorBoard alone.
      unused_after: steps after which an expert that no token has come to is told of, by layer and number.
      checkpoint_every, evaluate_every, log_every: in steps; a checkpoint is always written at the end.
      keep: newest checkpoints kept.
      keep_best: a figure of the evaluators and whether its smallest or largest value is best, such as
        `('masked/bits_per_token', 'min')`: of the checkpoints that were judged, the best one stays too.

    Raises:
      UserError: neither or both of steps and stages, or a number out of range.
    """

    model: Callable[..., Trunk]
    data: Any
    objective: Objective
    steps: Whole | None = None
    batch_size: Whole = 32
    length: Whole = 128
    accumulate: Whole = 1
    stages: Sequence[Stage] = ()
    optimizer: Optimizer
    rules: Rules | None = None
    seed: Annotated[int, Range(0, (1 << 32) - 1)] = 0
    clip: Annotated[float, Range(0, 1e30)] | None = 1.0
    guard: Guard | None = field(default_factory=Guard)
    average: Ema | None = None
    init_from: str | None = None
    reinitialise: Sequence[str] = ()
    freeze: Sequence[str] = ()
    evaluators: Sequence[Evaluator] = ()
    controllers: Sequence[Controller] = ()
    boards: Sequence[Boards] | None = None
    unused_after: Whole = 100
    checkpoint_every: Whole = 1000
    evaluate_every: Whole = 1000
    log_every: Whole = 10
    keep: Whole = 3
    keep_best: tuple[str, Literal["min", "max"]] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.keep_best is not None and not self.evaluators:
            raise UserError("Run.keep_best needs figures: bind training.Run.evaluators")
        if (self.steps is None) == (not self.stages):
            example = "training.Run.steps = 1_000"
            raise UserError(
                f"Run needs either steps or stages, and has {'both' if self.stages else 'neither'}: such as {example}"
            )

    def parts(self) -> list[Part]:
        """The stages with every value filled in."""
        whole = [Stage(steps=self.steps)] if self.steps is not None else list(self.stages)
        either = lambda own, ours: ours if own is None else own
        return [
            Part(
                steps=stage.steps,
                length=either(stage.length, self.length),
                batch_size=either(stage.batch_size, self.batch_size),
                accumulate=either(stage.accumulate, self.accumulate),
                objective=either(stage.objective, self.objective),
                data=either(stage.data, self.data),
                optimizer=either(stage.optimizer, self.optimizer),
            )
            for stage in whole
        ]

    def placed(self) -> Rules:
        """The rules, data parallel where none are given."""
        return data_parallel() if self.rules is None else self.rules

    def shown(self) -> Sequence[Boards]:
        """The boards, TensorBoard where none are named."""
        return (TensorBoard(),) if self.boards is None else self.boards

    def plan(self, devices: Sequence[Any] | None = None) -> Any:
        """Checks everything and plans every stage; see `training.plan.Plan`."""
        from training.plan import Plan

        return Plan.of(self, devices)

    def abstract(self) -> Any:
        """The abstract build and an abstract call, so that a missing value and a refused call show before step 0."""
        plan = self.plan()
        plan.exercise()
        return plan

    def train(
        self,
        out: str | os.PathLike,
        *,
        copy: str | os.PathLike | None = None,
        operative: str = "",
        debug: bool = False,
        watch: Any = None,
    ) -> dict[str, float]:
        """Trains into a folder, or goes on with what is there; see `training.loop.train`."""
        from training.loop import train

        return train(self, out, copy=copy, operative=operative, debug=debug, watch=watch)

    def describe(self) -> None:
        """Prints what the run would be, and trains nothing; see `training.description`."""
        from training.description import described
        from training.screen import say

        for line in described(self.plan()):
            say(line)

    def prepare(
        self, *, overwrite: bool = False, processes: int = 1, report: Callable[[str], None] = lambda line: None
    ) -> list[str]:
        """Prepares all that the run reads: its data, its stages' and its evaluators'.

        Args:
          overwrite: replace caches that were made otherwise.
          processes: how many tokenise the run's own data.
          report: takes one line about each thing done.

        Returns:
          The caches' folders, each once.
        """
        found: dict[str, None] = {}

        def once(line: str) -> None:
            # Several splits of one task lie in one cache: it is spoken of once.
            if not any(line.startswith(f"{folder}:") for folder in found):
                report(line)

        own = [(data, {"processes": processes}) for data in (self.data, *(stage.data for stage in self.stages))]
        for reads, how in (*own, *((evaluator, {}) for evaluator in self.evaluators)):
            if hasattr(reads, "prepare"):
                folders = reads.prepare(overwrite=overwrite, report=once, **how)
                found |= dict.fromkeys([folders] if isinstance(folders, str) else folders)
        return list(found)

    def restore(self, out: str | os.PathLike) -> tuple[Trunk, Any]:
        """The trunk of the newest complete checkpoint in a run's folder (averaged where the run averages), and the tokenizer."""
        from training.judging import restore

        return restore(self, place(out))

    def evaluate(self, out: str | os.PathLike) -> dict[str, Any]:
        """Runs the evaluators on the newest complete checkpoint in a run's folder, prints and returns their figures; loads by
        layer are arrays."""
        from training.judging import evaluate
        from training.programs import keep_programs
        from training.screen import say

        keep_programs()
        return evaluate(self.plan(), place(out), say)
