"""Paired measurements: contestants in processes of their own take turns, and what other processes disturbed is thrown away.

Ratios of alternating turns (A B A B), medians. A contestant waits for its turn in a read of its standard input and costs
nothing meanwhile. A round counts only where other processes used little of the machine, by `/proc/stat`: OpenMP programs
slow several times beside a busy neighbour and XLA's much less, so a contended ratio is not a ratio of the two programs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Set for every contestant. XLA allocates large temporaries afresh in each call: without a fixed allocator the same
# program takes once or twice the time by the allocator's state. Idle OpenMP threads sleep instead of spinning.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
}
ALLOWED = 0.1
"""Cores that other processes may use during a round that counts."""

_TICK = os.sysconf("SC_CLK_TCK")


def busy_seconds(stat: str) -> float:
    """Processor seconds of all processes since boot, time that a host took away included, from `/proc/stat`'s text."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.splitlines()[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / _TICK


def own_seconds(stat: str) -> float:
    """Processor seconds of one process, its threads and its ended children, from `/proc/<pid>/stat`'s text."""
    # The name in parentheses may hold spaces.
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICK


@dataclass(frozen=True)
class Reading:
    """The clock, and processor seconds used since boot by all processes and by ours."""

    clock: float
    everyone: float
    ours: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> Reading:
        """Reads them."""
        ours = sum(own_seconds(Path(f"/proc/{pid}/stat").read_text()) for pid in (os.getpid(), *pids))
        return cls(time.perf_counter(), busy_seconds(Path("/proc/stat").read_text()), ours)

    def others_since(self, before: Reading) -> float:
        """Cores that other processes used on average since `before`."""
        used = (self.everyone - before.everyone) - (self.ours - before.ours)
        return max(0.0, used / (self.clock - before.clock))


class Contestant:
    """A program in a process of its own that takes a turn when it is told to.

    Args:
      name: in the table.
      module, function: called in the process with `arguments`; returns (turn, facts): `turn()` runs once and waits for
        the result, or returns the seconds to count; `facts` is JSON that goes back to the one who measures.
      environment: what differs from `ENVIRONMENT`.
      arguments: JSON.

    Raises:
      RuntimeError: the process ended; it has said why on standard error.
    """

    def __init__(
        self,
        name: str,
        module: str,
        function: str,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        **arguments: Any,
    ):
        self.name = name
        command = [sys.executable, "-m", "benchmarks.turns", module, function, json.dumps(arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=os.environ | ENVIRONMENT | dict(environment)
        )
        self.pid = self._process.pid
        self.facts: dict[str, Any] = self._answer()

    def turn(self, times: int) -> list[float]:
        """Runs `times` times; the seconds of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{times}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class Round:
    """One turn of every contestant: median seconds by name, and the cores that other processes used meanwhile."""

    seconds: Mapping[str, float]
    others: float


@dataclass(frozen=True)
class Paired:
    """The rounds of a measurement.

    Args:
      kept: those that count.
      rejected: how many did not.
      contended: whether no round was quiet, so that the least contended ones were kept.
    """

    kept: tuple[Round, ...]
    rejected: int
    contended: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """The median over rounds."""
        return statistics.median(r.seconds[name] for r in self.kept)

    def ratio(self, name: str, over: str) -> float:
        """The median over rounds of the ratio within a round."""
        return statistics.median(r.seconds[name] / r.seconds[over] for r in self.kept)

    def ratios(self, name: str, over: str) -> tuple[float, float]:
        """The smallest and the largest of those ratios."""
        each = [r.seconds[name] / r.seconds[over] for r in self.kept]
        return min(each), max(each)

    def note(self) -> str:
        """One line on the rounds, for the results."""
        most = max(r.others for r in self.kept)
        quiet = f"{len(self.kept)} rounds kept, {self.rejected} rejected; others used at most {most:.2f} cores"
        return f"CONTENDED, not a measurement: {quiet}" if self.contended else quiet


def choose(rounds: Sequence[Round], wanted: int) -> Paired:
    """The quiet rounds; where there are none, the least contended ones, and a mark that says so.

    Args:
      rounds: all that were taken.
      wanted: how many contended rounds stand in for quiet ones.
    """
    quiet = tuple(r for r in rounds if r.others <= ALLOWED)
    kept = quiet or tuple(sorted(rounds, key=lambda r: r.others)[:wanted])
    return Paired(kept, len(rounds) - len(kept), not quiet)


def alternate(
    contestants: Sequence[Contestant],
    *,
    wanted: int = 7,
    turn_seconds: float = 1.0,
    patience: float = 240.0,
    times: int | None = None,
) -> Paired:
    """Measures contestants in turns until enough rounds were quiet.

    Args:
      contestants: they are closed at the end.
      wanted: rounds that must count.
      turn_seconds: about how long a turn takes.
      patience: seconds after which it is over, however few rounds were quiet.
      times: runs in a turn; None for as many as take `turn_seconds`.
    """
    pids = [c.pid for c in contestants]
    try:
        runs = {}
        for c in contestants:
            c.turn(times or 2)
            runs[c.name] = times or max(3, round(turn_seconds / max(statistics.median(c.turn(3)), 1e-6)))
        rounds: list[Round] = []
        end = time.perf_counter() + patience
        while sum(r.others <= ALLOWED for r in rounds) < wanted and time.perf_counter() < end:
            before, seconds = Reading.now(pids), {}
            for c in contestants:
                seconds[c.name] = statistics.median(c.turn(runs[c.name]))
            rounds.append(Round(seconds, Reading.now(pids).others_since(before)))
        found = choose(rounds, wanted)
        return Paired(found.kept, found.rejected, found.contended, {c.name: c.facts for c in contestants})
    finally:
        for c in contestants:
            c.close()


def fixed(seconds: float) -> tuple[Any, dict[str, float]]:
    """Contestant: takes no time and says that it took `seconds`; to try the harness itself."""
    print("what a turn prints is no answer")
    return (lambda: seconds), {"said": seconds}
