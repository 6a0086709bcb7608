"""What `palmette sweep` does."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints.lock import held
from launch.names import nearest
from launch.sweep import folder
from launch.sweep.description import Sweep
from launch.sweep.loading import Asked
from launch.sweep.planning import Planned, fingerprint, planned, resolve
from launch.sweep.pool import Pool, workers_by_default
from launch.sweep.queue import Queue, Run
from launch.sweep.table import table
from partitioning.errors import UserError


def dry_run(asked: Asked) -> None:
    """Plans every arm, prints what each would take, and runs nothing."""
    from training.screen import say

    sweep = asked.read()
    _check(sweep, asked.allow_import)
    found = _planned(sweep, asked.allow_import)
    rows = [["arm", "seeds", "steps", "tokens", "FLOPs"]]
    for one in found:
        cost = one.cost
        rows.append([one.arm.name, str(len(sweep.seeds)), f"{cost.steps:,}", f"{cost.tokens:.3g}", f"{cost.flops:.3g}"])
    for line in _aligned(rows):
        say(line)


def jobs(asked: Asked, out: Path) -> None:
    """Prints a shell command for every run that is not done: a cluster's array starts them, on a shared file system."""
    from training.screen import say

    sweep = asked.read()
    _check(sweep, asked.allow_import)
    if sweep.budget.kind != "time":
        _planned(sweep, asked.allow_import)
    folder.claim(out, asked.paths[0], sweep)
    for arm, seed in _waiting(sweep, out):
        say(shlex.join(["palmette", "sweep", *asked.words(), "--out", str(out), "--run", f"{arm}/{seed}"]))


def one(asked: Asked, out: Path, run: str) -> int:
    """Does one run of a sweep, in this process.

    Returns:
      The exit status: 1 where it failed.
    """
    from launch.sweep import running
    from training.screen import say

    sweep = asked.read()
    arms, (name, _, seed) = {arm.name: arm for arm in sweep.arms()}, run.rpartition("/")
    if name not in arms or seed not in map(str, sweep.seeds):
        known = [f"{arm}/{seed}" for arm in arms for seed in sweep.seeds]
        raise UserError(f"--run {run}: no run of this sweep, expected ARM/SEED{nearest(run, known)}")
    if not (out / "sweep.json").exists():
        folder.claim(out, asked.paths[0], sweep)
    end = folder.result(out, name, int(seed))
    if end is None or end["status"] != "done":
        end = running.run(planned(sweep, arms[name], out, asked.allow_import), int(seed), out)
    if end is not None and end["status"] == "failed":
        say(f"{run}: failed: {end['error']}")
        return 1
    return 0


def local(asked: Asked, out: Path, processes: int | None) -> int:
    """Runs what is not done, several arms at once.

    Returns:
      The exit status: 1 where a run failed.

    Raises:
      UserError: whatever of the sweep does not fit; nothing has been trained then.
    """
    import jax

    from training.screen import say

    # This process only hands out work: a device that it took would be missing to the workers.
    jax.config.update("jax_platforms", "cpu")
    sweep = asked.read()
    with held(out), folder.claimed(out, asked.paths[0], sweep):
        waiting = _waiting(sweep, out)
        total = len(sweep.arms()) * len(sweep.seeds)
        if len(waiting) < total:
            say(f"{out}: {total - len(waiting)} of {total} runs are done")
        failed: list[str] = []
        if waiting:
            workers = min(processes or workers_by_default(len(waiting)), len(waiting))
            with Pool(asked, out, workers) as pool:
                before = signal.signal(signal.SIGTERM, lambda *_: pool.stop())
                try:
                    # While the workers still import.
                    _check(sweep, asked.allow_import)
                    failed = [] if pool.stopping else _worked(sweep, pool, waiting, total)
                finally:
                    signal.signal(signal.SIGTERM, before)
                if pool.stopping:
                    say(f"{out}: stopped; the same command goes on")
                    return 0
    for line in _aligned(
        table(folder.read_sweep(out), folder.results(out, [a.name for a in sweep.arms()], sweep.seeds))
    ):
        say(line)
    if failed:
        say(f"{len(failed)} of {total} runs failed: {', '.join(failed)}; the same command tries them again")
    return 1 if failed else 0


def _worked(sweep: Sweep, pool: Pool, waiting: Sequence[Run], total: int) -> list[str]:
    """The names of the runs that failed."""
    from training.screen import say

    queue, failed = Queue(waiting), []
    arms = list(dict.fromkeys(arm for arm, _ in waiting))
    _differ({arm: found["digest"] for arm, found in pool.plan(queue, arms).items()})
    done = total - len(waiting)

    def told(run: Run, end: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        words = f"[{done}/{total}] {run[0]}, seed {run[1]}"
        if end["status"] == "failed":
            failed.append(f"{run[0]}/{run[1]}")
            say(f"{words}: failed: {end['error']}")
            return
        figure = end["figures"].get(sweep.metric[0])
        seconds = end["seconds"]
        beside = seconds["start"] + seconds["compile"] + seconds["evaluate"] + seconds["checkpoint"]
        value = "" if figure is None else f"{sweep.metric[0]} {figure:.4g}, "
        say(f"{words}: {value}{end['steps']:,} steps in {seconds['train']:.1f} s, {beside:.1f} s beside them")

    if not pool.stopping:
        pool.run(queue, told)
    return failed


def _check(sweep: Sweep, allow_import: Sequence[str]) -> None:
    """Every arm's configuration as far as it can be read without a plan, and the data that all share.

    Raises:
      UserError: an arm that does not resolve, two that are one, or no evaluator that gives the metric.
    """
    from training.screen import say

    prints, read_already = {}, set()
    for arm in sweep.arms():
        found = resolve(sweep, arm, allow_import)
        prints[arm.name] = fingerprint(found)
        run = found.value
        evaluators = list(run.evaluators)
        known = ["loss", *(name for evaluator in evaluators for name in getattr(evaluator, "figures", ()))]
        if sweep.metric[0] not in known and all(hasattr(evaluator, "figures") for evaluator in evaluators):
            raise UserError(
                f"metric: arm {arm.name} has no figure {sweep.metric[0]!r}: use one of {', '.join(known)}"
                f"{nearest(sweep.metric[0], known)}"
            )
        reads = repr((run.data, [stage.data for stage in run.stages], evaluators))
        if reads not in read_already:
            read_already.add(reads)
            run.prepare(report=say)
    _differ(prints)


def _differ(digests: Mapping[str, str]) -> None:
    """Raises UserError where two arms are the same run."""
    seen: dict[str, str] = {}
    for arm, found in digests.items():
        if found in seen:
            raise UserError(f"arms {seen[found]} and {arm} are the same run: leave one out, or mend its bindings")
        seen[found] = arm


def _planned(sweep: Sweep, allow_import: Sequence[str]) -> list[Planned]:
    """Every arm's plan."""
    found = []
    for arm in sweep.arms():
        found.append(planned(sweep, arm, None, allow_import))
        found[-1].plan.kept.clear()
    _differ({one.arm.name: one.digest for one in found})
    return found


def _waiting(sweep: Sweep, out: Path) -> list[Run]:
    """The runs that are not done; a failed one is tried again."""
    names = [arm.name for arm in sweep.arms()]
    ends = folder.results(out, names, sweep.seeds)
    done = {(arm, seed) for arm, runs in ends.items() for seed, end in runs.items() if end["status"] == "done"}
    return [(arm, seed) for arm in names for seed in sweep.seeds if (arm, seed) not in done]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
