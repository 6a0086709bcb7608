"""What each host of a run shows of itself: that it is alive, and how long it keeps the others waiting."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training.goodput import Goodput, beat_file

BEAT_S = 5.0
# A host is called slow when it holds the others up for more than this share of the time.
SLOW = 0.1
WAITS = ("waiting for data", "working on the host")


class Hosts:
    """Heartbeats, and the slowest host.

    A heartbeat is `hosts/<process>.json` in the run's folder: host, process id, steps done, the time. One that is old says
    which host hangs, and after which step. Seconds that hosts wait for data, and work while the device may be idle, go
    round at log steps: each sends its own without waiting, and reads what the last round brought.

    Args:
      out: the run's folder.
      goodput: this host's times.
      now: the clock, in seconds since 1970.
    """

    def __init__(self, out: Path, goodput: Goodput, *, now: Callable[[], float] = time.time):
        self._path, self._goodput, self._now = beat_file(out, jax.process_index()), goodput, now
        self._beaten = -float("inf")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._before = np.zeros(3)
        self._sent: Any = None

    def beat(self, step: int) -> None:
        """Says that this host is alive, at most every five seconds."""
        now = self._now()
        if now - self._beaten < BEAT_S:
            return
        self._beaten = now
        told = {"host": socket.gethostname(), "pid": os.getpid(), "step": step, "time": now}
        told["wall_s"] = sum(self._goodput.seconds.values())
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(told), encoding="utf-8")
        aside.replace(self._path)

    def compare(self) -> tuple[dict[str, float], str | None]:
        """What the last round brought: figures, and a line about a host that holds the others up; nothing on one host.

        Every host calls it at the same steps.
        """
        if jax.process_count() == 1:
            return {}, None
        seconds = self._goodput.seconds
        total = np.array([seconds["data"], seconds["step"], seconds["device"]])
        own, self._before = total - self._before, total
        found, self._sent = self._sent, _gathered(own)
        return ({}, None) if found is None else slowest(np.asarray(found.addressable_data(0)))


def slowest(times: Sequence[Any] | np.ndarray) -> tuple[dict[str, float], str | None]:
    """The host that was slowest at each kind of wait, and a line if it holds the others up.

    Args:
      times: seconds of each host in a round: waiting for data, working on the host, waiting for the device.
    """
    times = np.asarray(times, np.float64)
    figures: dict[str, float] = {}
    line = None
    for kind, words in enumerate(WAITS):
        name = ("data", "host")[kind]
        worst, median = int(times[:, kind].argmax()), float(np.median(times[:, kind]))
        most, whole = float(times[worst, kind]), float(times[worst].sum())
        figures |= {f"hosts/{name}_s": median, f"hosts/slowest_{name}_s": most, f"hosts/slowest_{name}": float(worst)}
        if line is None and most - median > SLOW * whole:
            line = f"host {worst} is slow: {most:.1f} s of {whole:.1f} s {words}, the median host {median:.1f} s"
    return figures, line


def _gathered(own: np.ndarray) -> jax.Array:
    """Every host's numbers on every host, by and by: nothing waits for them here."""
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[host] for host in sorted(firsts)]), "host")
    shape = (len(firsts), *own.shape)
    mine = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("host")), own[None].astype(np.float32), shape
    )
    return _same(mesh)(mine)


@cache
def _same(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
