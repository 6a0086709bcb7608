"""Where a run's wall time goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.metrics import FILE
from training.progress import clock_time

# What is reported, and in words.
KINDS = {
    "step": "steps",
    "start": "start",
    "compile": "compilation",
    "data": "waiting for data",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "lost": "lost to restarts",
}
PREFIX, WALL = "goodput/", "goodput/wall_s"


class Goodput:
    """Seconds by what they went to. At every moment one kind runs, so they add up to the wall time of all starts.

    start: planning, the initial or restored state. data: the loop waits for a batch. checkpoint: a save blocks the loop.
    step: everything else of the loop; `device` is the part in which it waits for a step to end. lost: what earlier starts did
    after the checkpoint that this one goes on from. The time between two starts is nobody's.

    Args:
      now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._kind, self._since = "start", now()
        self.seconds = dict.fromkeys((*KINDS, "device"), 0.0)

    def __call__(self, kind: str) -> Span:
        """A block whose time goes to `kind`; what is around it goes on behind it."""
        return Span(self, kind)

    def turn(self, kind: str) -> str:
        """From now on time goes to `kind`; returns what it went to."""
        now = self._now()
        before, self._kind = self._kind, kind
        self.seconds[before] += now - self._since
        self._since = now
        return before

    def resume(self, out: Path, step: int) -> None:
        """Adds what earlier starts of a run took; call it before its metrics are cut to the step that it goes on from.

        Args:
          out: the run's folder.
          step: steps done at the checkpoint; what was measured after it is lost.
        """
        earlier = list(_earlier(out / FILE))
        kept = next((found for done, found in reversed(earlier) if done <= step), {})
        walls = [sum(found.values()) for _, found in earlier] + [_last_beat(out)]
        for kind, seconds in kept.items():
            self.seconds[kind] += seconds
        self.seconds["lost"] += max(walls) - sum(kept.values())

    def figures(self) -> dict[str, float]:
        """Shares of the wall time by kind, which add up to 1, and the wall time."""
        self.turn(self._kind)
        wall = sum(self.seconds.values())
        seconds = self.seconds | {"step": self.seconds["step"] + self.seconds["device"]}
        return {f"{PREFIX}{kind}": seconds[kind] / wall if wall else 0.0 for kind in KINDS} | {WALL: wall}

    def line(self) -> str:
        """The split in words, what is less than a thousandth aside."""
        found = self.figures()
        shares = [(words, found[f"{PREFIX}{kind}"]) for kind, words in KINDS.items()]
        parts = [f"{words} {100 * share:.1f}%" for words, share in shares if share >= 0.0005]
        return f"wall time {clock_time(found[WALL])}: {', '.join(parts)}"


class Span:
    """A block of one kind."""

    __slots__ = ("_before", "_goodput", "_kind")

    def __init__(self, goodput: Goodput, kind: str):
        self._goodput, self._kind = goodput, kind

    def __enter__(self) -> None:
        self._before = self._goodput.turn(self._kind)

    def __exit__(self, *_: object) -> None:
        self._goodput.turn(self._before)


def _earlier(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps done and seconds by kind, of every split in a metrics file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = parsed(line)
        if WALL in found:
            yield found["step"], {kind: found[f"{PREFIX}{kind}"] * found[WALL] for kind in KINDS}


def _last_beat(out: Path) -> float:
    """Wall time at the first host's last heartbeat; it comes more often than a metric."""
    path = beat_file(out, 0)
    return float(parsed(path.read_text(encoding="utf-8")).get("wall_s", 0.0)) if path.exists() else 0.0


def beat_file(out: Path, host: int) -> Path:
    """Where a host's heartbeat is."""
    return out / "hosts" / f"{host}.json"


def parsed(line: str) -> dict[str, Any]:
    """A JSON object; empty where a kill cut it short."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
