"""The training loop, read from top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints.barrier import barrier
from checkpoints.folder import Folder, checkpoints_in, opened
from data.prefetch import Prefetch
from models.loads import Loads
from objectives.draws import draws
from partitioning import UserError
from training.control import ControlLog
from training.environment import keep_environment
from training.flops import FlopCount, forward_flops, mfu, mfu_formula, peak_flops, training_flops
from training.goodput import Goodput
from training.hosts import Hosts
from training.init_from import keep_report
from training.interrupt import Interrupt
from training.judging import arrays, judged, lines, numbers, open_judges, values_of, write_examples
from training.metrics import MetricWriter
from training.plan import Plan, PlannedStage
from training.programs import keep_programs
from training.progress import Progress
from training.run import Run
from training.screen import console, say
from training.spent import Spent
from training.state import State
from training.store import Store
from training.unused import Unused
from training.watch import Trace, Watch, dump, dump_memory

DEPTH = 2


def train(
    run: Run,
    out: str | os.PathLike,
    *,
    copy: str | os.PathLike | None = None,
    operative: str = "",
    debug: bool = False,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Trains a run into a folder, or goes on with what is there.

    Args:
      run: what to train.
      out: gets `config.gin`, `environment.json`, `checkpoints/`, `metrics.jsonl` and what its boards write; a local folder or
        gs://BUCKET/FOLDER.
      copy: another such folder, which gets every checkpoint too; steps then wait until a checkpoint is written, and no single
        fault costs more than those from one to the next (see `checkpoints.copied`).
      operative: the config's text, kept beside the run.
      debug: runs without jit and stops at the first NaN.
      watch: what else to write of the run's programs.

    Returns:
      The last figures: loss and evaluations.

    Raises:
      UserError: what the plan refuses; a folder that holds another run, or that another process trains into; too many bad
        steps in a row.
    """
    # 1. The plan: every check that needs no device memory.
    goodput = Goodput()
    keep_programs()
    return follow(run.plan(), out, copy=copy, operative=operative, debug=debug, watch=watch, goodput=goodput)


def follow(
    plan: Plan,
    out: str | os.PathLike,
    *,
    copy: str | os.PathLike | None = None,
    operative: str = "",
    debug: bool = False,
    watch: Watch | None = None,
    goodput: Goodput | None = None,
) -> dict[str, float]:
    """Trains as planned; what this plan, or one of another seed, has compiled before is not compiled again.

    Args:
      plan: of the run.
      out, copy, operative, debug, watch: as in `train`.
      goodput: has counted since the start; None for one that begins now.

    Returns:
      As `train`.

    Raises:
      UserError: as `train`.
    """
    store = Store(plan, checkpoints_in(out), None if copy is None else checkpoints_in(copy))
    watch, goodput = Watch() if watch is None else watch, Goodput() if goodput is None else goodput
    if jax.process_index() == 0:
        for board in plan.run.shown():
            board.check()
    with ExitStack() as held:
        folder, *copies = (held.enter_context(opened(place, say)) for place in (out, copy) if place is not None)
        return _trained(plan, store, folder, copies, operative, debug, watch, goodput)


def _trained(
    plan: Plan,
    store: Store,
    folder: Folder,
    copies: Sequence[Folder],
    operative: str,
    debug: bool,
    watch: Watch,
    goodput: Goodput,
) -> dict[str, float]:
    run, out = plan.run, folder.path

    # 2. The state: the newest complete checkpoint's, or the initial one.
    log = ControlLog(tuple(run.controllers))
    if store.checkpoints.steps():
        state, saved = store.restore()
        log = ControlLog.restored(tuple(run.controllers), saved)
        say(f"{folder.address}: goes on from the checkpoint of step {int(state.step)}")
    else:
        initial = plan.initial()
        keep_report(out, initial, say)
        state = plan.init(initial)
    start = int(state.step)
    watch.check(done=start, steps=plan.steps)
    for place in (folder, *copies):
        _keep_config(place.path, operative)
    keep_environment(out, start)
    goodput.resume(out, start)
    spent = Spent(out, start)

    # 3. One program a stage, all compiled before the first step; then steps.
    with (
        store.checkpoints,
        MetricWriter(out, step=start, boards=run.shown()) as writer,
        Progress(plan.steps, done=start, checkpoint_every=run.checkpoint_every, console=console()) as progress,
        Interrupt() as interrupt,
        Trace(watch, out) as trace,
        plan.placement.scope(),
    ):
        if not start:
            store.start(state)
            if operative:
                writer.text("config", operative)
        remaining = [stage for stage in plan.stages if stage.last > start]
        with goodput("compile"):
            programs = [_debugged(stage) if debug else _compiled(plan, stage, progress.say) for stage in remaining]
            # Collectives bear less waiting for each other than compilers take: no host begins before all can.
            barrier("compiled", timeout_s=store.checkpoints.timeout_s)
        if watch.dump and not debug:
            for stage, program in zip(remaining, programs, strict=True):
                progress.say(f"program written: {dump(program, stage.first, out)}")
        for line in plan.trees.warnings:
            progress.say(line)
        loop = Loop(
            plan,
            store,
            log,
            writer,
            progress,
            interrupt,
            goodput,
            Hosts(folder, goodput),
            trace,
            spent,
            folder,
            copies,
            watch,
            debug,
        )
        for stage, program in zip(remaining, programs, strict=True):
            with goodput("step"):
                state = loop.stage(stage, program, state)
            if watch.dump:
                dump_memory(out)
            if loop.stopped and int(state.step) < plan.steps:
                progress.say(f"interrupted: saved at step {int(state.step)}; the same command goes on")
                break
        with goodput("checkpoint"):
            store.checkpoints.wait()
        if remaining:
            writer.write(int(state.step), goodput.figures())
            progress.say(goodput.line())
        return loop.figures


@dataclass
class Loop:
    """What the steps of all stages share."""

    plan: Plan
    store: Store
    log: ControlLog
    writer: MetricWriter
    progress: Progress
    interrupt: Interrupt
    goodput: Goodput
    hosts: Hosts
    trace: Trace
    spent: Spent
    folder: Folder
    copies: Sequence[Folder]
    watch: Watch
    debug: bool
    figures: dict[str, float] = field(default_factory=dict)
    words: str = ""
    stopped: bool = False

    def __post_init__(self):
        self.judges = self.plan.once("judges", lambda: open_judges(self.plan))
        self.unused = Unused(self.plan.run.unused_after)
        self.share, self.shares = self.plan.placement.share
        self.devices, self.peak = self.plan.placement.mesh.size, peak_flops(self.plan.placement.mesh.devices.flat[0])

    def stage(self, stage: PlannedStage, program: Any, state: State) -> State:
        """Takes the stage's steps that are left."""
        run = self.plan.run
        begin = max(stage.first, int(state.step))
        with self.goodput("compile"):
            flops = self.flops = self.plan.once(("flops", stage.first), lambda: step_flops(self.plan, stage))
        self.progress.say(mfu_formula(flops, "seconds of a step", devices=self.devices, peak=self.peak))
        self.progress.measure(lambda seconds: mfu(flops, seconds, devices=self.devices, peak=self.peak).value)
        before: tuple[int, int, Any] | None = None
        with Prefetch(lambda step: self._batch(stage, step), first=begin, last=stage.last, depth=DEPTH) as batches:
            for step in range(begin, stage.last):
                with self.goodput("data"):
                    batch = next(batches)
                tokens = sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.split("/")[-1] == "segments")
                self.trace.before(step + 1, state)
                state, out = program(state, self.plan.put(stage, batch))
                if (line := self.trace.after(step + 1, state)) is not None:
                    self.progress.say(line)
                # The device never waits for the host: what is read back is the step before.
                if before is not None:
                    self._read(stage, *before)
                before = (step + 1, tokens, out)
                done = step + 1
                # Asked once: a request that comes after this is for the next step.
                self.stopped = self.interrupt.asked(done)
                last = done == self.plan.steps or self.stopped
                judge = bool(self.judges) and (done % run.evaluate_every == 0 or last)
                save = done % run.checkpoint_every == 0 or last
                # A debugged step has ended when it returns: there is nothing to wait for.
                if judge or save or self.debug:
                    self._read(stage, *before)
                    before = None
                # Judged before saved: whatever a checkpoint has behind it is on file.
                found = self.evaluate(done, state) if judge else {}
                if save:
                    self.writer.write(done, self.spent.figures())
                    with self.goodput("checkpoint"):
                        for place in (self.folder, *self.copies):
                            place.keep()
                        self.store.save(state, self.log.saved(), found)
                    self.writer.write(done, self.goodput.figures())
                if self.stopped:
                    break
        if before is not None:
            self._read(stage, *before)
        return state

    def _batch(self, stage: PlannedStage, step: int) -> dict[str, np.ndarray]:
        return stage.reader.batch(
            step - stage.first,
            batch_size=stage.stage.batch_size,
            length=stage.stage.length,
            seed=self.plan.run.seed,
            start=stage.rows,
            host=self.share,
            hosts=self.shares,
            control=(*stage.control, *self.log.entries),
        )

    def _read(self, stage: PlannedStage, done: int, tokens: int, out: Mapping[str, Any]) -> None:
        """Reads a finished step back: the guard, the controllers, unused experts, the log."""
        run = self.plan.run
        self.spent.add(tokens * self.shares, self.flops.flops)
        if run.guard is not None:
            with self.goodput("device"):
                run.guard.check({"run": out["metrics"]["skipped_in_a_row"]}, step=done)
        if run.controllers:
            first = {"mixture": stage.reader.weights} if stage.reader.weights else {}
            known = len(self.log.entries)
            self.log.observe(done, jax.device_get(out["sums"]), first, self.plan.row)
            for entry in self.log.entries[known:]:
                self.progress.say(f"step {done}: from step {entry.step} on {dict(entry.values)}")
        with self.goodput("device"):
            loads = Loads(out["tallies"])
        for words in self.unused.add(loads):
            self.progress.say(f"step {done}: {words}")
        if done % run.log_every == 0 or done == self.plan.steps or not self.figures:
            with self.goodput("device"):
                metrics = {name: float(value) for name, value in jax.device_get(out["metrics"]).items()}
            metrics |= stage.reader.epochs(
                self.plan.row(done),
                length=stage.stage.length,
                seed=run.seed,
                control=(*stage.control, *self.log.entries),
            )
            self.figures["loss"] = metrics["loss"]
            self.words = loads.words()
            self.writer.write(done, metrics | self.spent.figures() | loads.figures())
            figures, line = self.hosts.compare()
            self.writer.write(done, self.goodput.figures() | figures)
            if line is not None:
                self.progress.say(line)
        self.hosts.beat(done)
        self.progress.update(done, loss=self.figures["loss"], tokens=tokens * self.shares, words=self.words)

    def evaluate(self, done: int, state: State) -> dict[str, float]:
        """Runs the evaluators, and puts their figures on file and on screen."""
        with self.goodput("evaluation"):
            examples: dict[str, Any] = {}
            found = judged(self.judges, values_of(self.plan, state), examples)
            if self.watch.examples and done == self.plan.steps and not jax.process_index():
                write_examples(self.folder.path / "examples.json", examples)
        self.figures |= (scalars := numbers(found))
        self.writer.write(done, {f"evaluation/{name}": value for name, value in arrays(found).items()})
        for line in lines(found):
            self.progress.say(f"step {done}: {line}")
        return scalars


def step_flops(plan: Plan, stage: PlannedStage) -> FlopCount:
    """Model FLOPs of a stage's step: what `prepare` does once, and three times the objective's forward pass."""
    step = stage.step

    def prepare(state: State, batch: Any) -> Any:
        key = draws(jax.random.key(0), state.step, batch["row"], step.batch_size)
        models = plan.trees.models(state.params, state.frozen, state.buffers)
        return step.objective.prepare(models, batch, step=state.step, key=key)

    def forward(state: State, batch: Any) -> Any:
        key = draws(jax.random.key(0), state.step, batch["row"], step.batch_size)
        models = plan.trees.models(state.params, state.frozen, state.buffers)
        loss = step.objective(models, batch, step=state.step, key=key)
        return [term.total for term in loss.terms.values()]

    prepared = jax.eval_shape(prepare, plan.state, stage.batch)
    once = forward_flops(prepare, plan.state, stage.batch)
    return once + training_flops(forward_flops(forward, plan.state, prepared))


def _compiled(plan: Plan, stage: PlannedStage, say: Callable[[str], None]) -> Any:
    program = plan.once(("step", stage.first), lambda: plan.compile(stage))
    memory = program.memory_analysis()
    if memory is not None:
        parts = (("arguments", memory.argument_size_in_bytes), ("temporaries", memory.temp_size_in_bytes))
        say(f"step program from step {stage.first}: " + ", ".join(f"{n / 2**20:,.1f} MiB {name}" for name, n in parts))
    return program


def _debugged(stage: PlannedStage) -> Callable[[State, Any], tuple[State, Any]]:
    """The step without jit, every operation checked for NaN."""

    def step(state: State, batch: Any) -> tuple[State, Any]:
        with jax.disable_jit(), jax.debug_nans(True):
            try:
                return stage.step(state, batch)
            except FloatingPointError as error:
                raise UserError(f"step {int(state.step)}: first NaN: {error}") from error

    return step


def _keep_config(out: Path, text: str) -> None:
    """Writes `config.gin` in one go."""
    if not text or jax.process_index():
        return
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".config.gin.{os.getpid()}"
    aside.write_text(text, encoding="utf-8")
    aside.replace(out / "config.gin")
