"""A process that plans and runs arms, one after the other: imports and what was compiled stay for the next.

It reads jobs as lines of JSON and answers each with one; what a run prints goes into the run's own `log.txt`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import IO, Any


def main(asked: str, out: str, cores: str) -> None:
    """Answers until its input ends.

    Args:
      asked: the sweep, as `launch.sweep.loading.Asked.text` has it.
      out: the sweep's folder.
      cores: that it is pinned to, joined with commas; empty for all.
    """
    # A program that takes a tenth of a second to compile is worth keeping for the workers beside this one.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # What anything prints, compilers included, must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs = Jobs(sys.stdin)
    from launch.sweep.loading import Asked

    arms = Arms(Asked.of(asked), Path(out))
    while (job := jobs.next()) is not None:
        answers.write(json.dumps(arms.answer(job)) + "\n")
        answers.flush()


class Jobs:
    """Lines of the input. When it ends, so does the process, whatever it does: its sweep is gone.

    Args:
      file: the input.
    """

    def __init__(self, file: IO[str]):
        self._lines: list[str | None] = []
        self._there, self._busy = threading.Semaphore(0), True
        threading.Thread(target=self._read, args=(file,), daemon=True).start()

    def _read(self, file: IO[str]) -> None:
        for line in file:
            self._lines.append(line)
            self._there.release()
        if self._busy:
            os._exit(1)
        self._lines.append(None)
        self._there.release()

    def next(self) -> dict[str, Any] | None:
        """The next job; None when there is none any more."""
        self._busy = False
        self._there.acquire()
        line = self._lines.pop(0)
        self._busy = True
        return None if line is None else json.loads(line)


class Arms:
    """The arms of a sweep, planned when they are first asked for."""

    def __init__(self, asked: Any, out: Path):
        self.sweep, self.out, self.allow_import = asked.read(), out, asked.allow_import
        self.arms = {arm.name: arm for arm in self.sweep.arms()}
        self.plans: dict[str, Any] = {}
        self.last = ""

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Does a job: plans an arm, or runs one with a seed."""
        from partitioning.errors import UserError

        try:
            if job["do"] == "plan":
                planned = self.plan(job["arm"])
                return {"digest": planned.digest, "steps": planned.cost.steps}
            return self.run(job["arm"], job["seed"])
        except UserError as error:
            return {"refused": str(error)}

    def plan(self, name: str) -> Any:
        """The arm's plan."""
        from launch.sweep.planning import planned

        if name not in self.plans:
            self.plans[name] = planned(self.sweep, self.arms[name], self.out, self.allow_import)
        return self.plans[name]

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One run; its plan is that of the run before where the arm is."""
        from launch.sweep.folder import run_folder
        from launch.sweep.running import run

        planned = self.plan(name)
        if self.last not in ("", name):
            # One arm's programs at a time: they hold memory.
            self.plans[self.last].plan.kept.clear()
        before = 0.0 if self.last == name else planned.took_s
        self.last = name
        folder = run_folder(self.out, name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            kept = os.dup(1), os.dup(2)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                end = run(planned, seed, self.out, before_s=before)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(kept[0], 1)
                os.dup2(kept[1], 2)
                for descriptor in kept:
                    os.close(descriptor)
        return {"stopped": True} if end is None else {"result": end}


if __name__ == "__main__":
    main(*sys.argv[1:])
