"""What each host of a run shows of itself: that it is alive, and how long it keeps the others waiting."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from checkpoints.folder import Folder
from partitioning.key_values import key_values
from training.goodput import Goodput, beat_file

BEAT_S = 5.0
_STARTS = itertools.count()
# A host is called slow when it holds the others up for more than this share of the time.
SLOW = 0.1
WAITS = {"data": "waiting for data", "host": "working on the host"}


class Hosts:
    """Heartbeats, and the slowest host by them.

    A heartbeat is `hosts/<process>.json` in the run's folder: host, process id, steps done, the time, and the seconds so far
    of waiting for data, of work while the device may be idle, and of waiting for the device. One that is old says which host
    hangs, and after which step. The first host hears those of the others from the store of keys that the hosts of a run
    share; no device is asked, so no step waits.

    Args:
      folder: the run's.
      goodput: this host's times.
      now: the clock, in seconds since 1970.
    """

    def __init__(self, folder: Folder, goodput: Goodput, *, now: Callable[[], float] = time.time):
        self._folder, self._goodput, self._now = folder, goodput, now
        self._host, self._count = jax.process_index(), jax.process_count()
        self._store, self._keys = key_values(), f"palmette/pace/{next(_STARTS)}/"
        self._beaten, self._fresh = -float("inf"), False
        self._before: dict[str, dict[str, Any]] = {}
        beat_file(folder.path, 0).parent.mkdir(parents=True, exist_ok=True)

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
        if self._store is not None:
            self._store.key_value_set(f"{self._keys}{self._host}", json.dumps(told), allow_overwrite=True)
        path = beat_file(self._folder.path, self._host)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(told), encoding="utf-8")
        aside.replace(path)
        self._folder.soon(path)

    def compare(self) -> tuple[dict[str, float], str | None]:
        """On the first of several hosts, when all have shown themselves again: figures, and a line about one that is slow."""
        if self._count == 1 or self._host or not self._fresh:
            return {}, None
        self._fresh = False
        beats = {key: json.loads(told) for key, told in self._store.key_value_dir_get(self._keys)}
        before = self._before
        if len(beats) < self._count or any(beats[key]["time"] <= old["time"] for key, old in before.items()):
            return {}, None
        self._before = beats
        if not before:
            return {}, None
        kinds = ("data_s", "host_s", "device_s")
        names = [f"{self._keys}{host}" for host in range(self._count)]
        return slowest([[beats[name][kind] - before[name][kind] for kind in kinds] for name in names])


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
