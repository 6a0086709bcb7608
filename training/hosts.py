"""What each host of a run shows of itself: that it is alive, and how long it keeps the others waiting."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from training.goodput import Goodput, beat_file, parsed

BEAT_S = 5.0
# A host is called slow when it holds the others up for more than this share of the time.
SLOW = 0.1
WAITS = {"data": "waiting for data", "host": "working on the host"}


class Hosts:
    """Heartbeats, and the slowest host by them.

    A heartbeat is `hosts/<process>.json` in the run's folder: host, process id, steps done, the time, and the seconds so far
    of waiting for data, of work while the device may be idle, and of waiting for the device. One that is old says which host
    hangs, and after which step. The first host reads those of the others; no device is asked, so no step waits.

    Args:
      out: the run's folder, which all hosts see.
      goodput: this host's times.
      now: the clock, in seconds since 1970.
    """

    def __init__(self, out: Path, goodput: Goodput, *, now: Callable[[], float] = time.time):
        self._out, self._goodput, self._now = out, goodput, now
        self._host, self._count = jax.process_index(), jax.process_count()
        self._beaten, self._fresh = -float("inf"), False
        self._before: list[dict[str, Any]] = []
        beat_file(out, 0).parent.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int) -> None:
        """Says that this host is alive, at most every five seconds."""
        now = self._now()
        if now - self._beaten < BEAT_S:
            return
        self._beaten, self._fresh = now, True
        seconds = self._goodput.seconds
        told = {"host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": now}
        told |= {"wall_s": sum(seconds.values())}
        told |= {"data_s": seconds["data"], "host_s": seconds["step"], "device_s": seconds["device"]}
        path = beat_file(self._out, self._host)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(told), encoding="utf-8")
        aside.replace(path)

    def compare(self) -> tuple[dict[str, float], str | None]:
        """On the first of several hosts, when all have shown themselves again: figures, and a line about one that is slow."""
        if self._count == 1 or self._host or not self._fresh:
            return {}, None
        self._fresh = False
        paths = [beat_file(self._out, host) for host in range(self._count)]
        beats = [parsed(path.read_text(encoding="utf-8")) if path.exists() else {} for path in paths]
        if not all("data_s" in beat for beat in beats):
            return {}, None
        before = self._before
        if [beat["pid"] for beat in before] != [beat["pid"] for beat in beats]:
            # The first time, or an earlier start's.
            self._before = beats
            return {}, None
        if any(new["time"] <= old["time"] for new, old in zip(beats, before, strict=True)):
            return {}, None
        self._before = beats
        kinds = ("data_s", "host_s", "device_s")
        return slowest([[new[k] - old[k] for k in kinds] for new, old in zip(beats, before, strict=True)])


def slowest(times: Sequence[Any] | np.ndarray) -> tuple[dict[str, float], str | None]:
    """The host that was slowest at each kind of wait, and a line if it holds the others up.

    Args:
      times: seconds of each host between two beats: waiting for data, working on the host, waiting for the device.
    """
    times = np.asarray(times, np.float64)
    figures: dict[str, float] = {}
    line = None
    for kind, (name, words) in enumerate(WAITS.items()):
        worst, median = int(times[:, kind].argmax()), float(np.median(times[:, kind]))
        most, whole = float(times[worst, kind]), float(times[worst].sum())
        figures |= {f"hosts/{name}_s": median, f"hosts/slowest_{name}_s": most, f"hosts/slowest_{name}": float(worst)}
        if line is None and most - median > SLOW * whole:
            line = f"host {worst} is slow: {most:.1f} s of {whole:.1f} s {words}, the median host {median:.1f} s"
    return figures, line
