"""What a person asks to see of a run's programs: a trace of some steps, and the compiled step itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from partitioning import UserError


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is asked for.

    Args:
      first, last: steps of the trace, as metrics count them; None for no trace.
      dump: whether each step's program is written out.
      examples: whether the last evaluation's figures of each example are, as `examples.json`.
    """

    first: int | None = None
    last: int | None = None
    dump: bool = False
    examples: bool = False

    @classmethod
    def of(cls, profile: str | None, dump: bool) -> Watch:
        """From the command's words.

        Raises:
          UserError: `profile` is not of the form 10:15.
        """
        if profile is None:
            return cls(dump=dump)
        found = re.fullmatch(r"(\d+):(\d+)", profile)
        first, last = map(int, found.groups()) if found else (0, 0)
        if not 1 <= first <= last:
            raise UserError(f"--profile {profile}: expected the first and the last step, such as 10:15")
        return cls(first=first, last=last, dump=dump)

    def check(self, *, done: int, steps: int) -> None:
        """Against a run of so many steps, of which some are done.

        Raises:
          UserError: not all steps of the trace will be taken.
        """
        if self.first is not None and self.last is not None and not done < self.first <= self.last <= steps:
            raise UserError(
                f"--profile {self.first}:{self.last}: this start takes steps {done + 1} to {steps}"
                if done < steps
                else f"--profile {self.first}:{self.last}: all {steps} steps are done"
            )


class Trace:
    """A trace of some steps for TensorBoard, in `profile/` of the run's folder.

    Args:
      watch: which steps.
      out: the run's folder.
    """

    def __init__(self, watch: Watch, out: Path):
        self._watch, self._folder, self._on = watch, out / "profile", False

    def before(self, step: int, state: Any) -> None:
        """Begins with a step, when those before it have ended."""
        if step == self._watch.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, state: Any) -> str | None:
        """Ends when a step has ended; returns a line about it."""
        if not self._on or step != self._watch.last:
            return None
        jax.block_until_ready(state)
        self.close()
        return f"steps {self._watch.first} to {step} traced: tensorboard --logdir {self._folder}"

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dump(program: Any, first: int, out: Path) -> Path:
    """Writes a step's program into `programs/` of a run's folder: optimised HLO, and the memory that it needs.

    Args:
      program: compiled.
      first: the stage's first step, in the names.
      out: the run's folder.

    Returns:
      The HLO's file.
    """
    path = out / "programs" / f"step_{first:06d}.hlo.txt"
    if not jax.process_index():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(program.as_text(), encoding="utf-8")
        memory = program.memory_analysis()
        kinds = [name for name in dir(memory) if name.endswith("_in_bytes")]
        sizes = {name.removesuffix("_in_bytes"): getattr(memory, name) for name in kinds}
        path.with_name(f"step_{first:06d}.memory.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return path


def dump_memory(out: Path) -> None:
    """Writes what is in the devices' memory now, for `pprof`, beside the programs."""
    if not jax.process_index():
        jax.profiler.save_device_memory_profile(str(out / "programs" / "memory.prof"))
