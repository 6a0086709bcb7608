"""One run of a sweep, from an arm's plan to its `result.json`."""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.sweep.folder import keep_result, last_figures, run_folder
from launch.sweep.planning import Planned, with_seed
from partitioning.errors import UserError


def run(planned: Planned, seed: int, out: Path, *, before_s: float = 0.0) -> dict[str, Any] | None:
    """Trains an arm with one seed, or goes on with it.

    Args:
      planned: the arm; its next run shares what this one compiles.
      seed: of the run.
      out: the sweep's folder.
      before_s: seconds that went before it and count to its start.

    Returns:
      Its result, done or failed; None where it was asked to stop.
    """
    path = run_folder(out, planned.arm.name, seed)
    cost = planned.cost
    spent: dict[str, Any] = {"steps": cost.steps, "tokens": cost.tokens, "flops": cost.flops}
    spent["stages"] = [asdict(stage) for stage in cost.stages]
    try:
        _train(planned, seed, path)
    except UserError as error:
        return keep_result(path, "failed", error=" ".join(str(error).split()), **spent)
    except Exception as error:
        traceback.print_exc()
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return keep_result(path, "failed", error=line[:500], **spent)
    figures, seconds = last_figures(path, cost.steps)
    if not seconds:
        return None
    seconds["start"] += before_s
    return keep_result(path, "done", figures=figures, seconds=seconds, **spent)


def _train(planned: Planned, seed: int, path: Path) -> None:
    from training.loop import follow
    from training.programs import keep_programs
    from training.watch import Watch

    operative, kept = with_seed(planned.operative, seed), path / "config.gin"
    if kept.exists() and kept.read_text(encoding="utf-8") != operative:
        raise UserError(f"{kept}: is of another run than this sweep's: use another --out")
    keep_programs()
    follow(planned.plan.with_seed(seed), path, operative=operative, watch=Watch(examples=True))
