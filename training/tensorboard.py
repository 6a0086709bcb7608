"""TensorBoard: event files for people to look at."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FLUSH_S = 60.0
"""Between two flushes."""
BINS = 30
"""Of a histogram."""


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard's event files, in the run's folder."""

    def check(self) -> None:
        """Nothing to check: it is always installed."""

    def open(self, folder: Path, *, step: int) -> "Events":
        """A new file, behind those of earlier starts."""
        # Events cannot be cut; a purge step makes readers forget those after it. File names begin with the second they
        # were made in and are read in order: the suffix keeps a start within the same second apart, and behind.
        suffix = f".{step:012d}.{os.getpid()}.{time.time_ns()}"
        return Events(folder, suffix, purge=step + 1 if step else None)


class Events:
    """TensorBoard's file, written by the caller's thread, which meets a full disk itself.

    tensorboardX's own writer leaves that to a thread: a full disk ends the thread, and calls then wait for it for ever.

    Args:
      folder: of the file.
      suffix: of its name.
      purge: readers forget earlier files' events from this step on; None for nothing.
    """

    def __init__(self, folder: Path, suffix: str, *, purge: int | None):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._make, self._event = summary, event_pb2.Event
        self._file = event_file_writer.EventsWriter(str(folder / "events"), suffix)
        self._flushed = time.monotonic()
        if purge is not None:
            self._add(purge, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds numbers by name, at one step, and lists of numbers as histograms."""
        for name, value in values.items():
            if isinstance(value, list):
                finite = [number for number in map(float, value) if math.isfinite(number)]
                if finite:
                    self._add(step, summary=self._make.histogram(name, np.asarray(finite), bins=BINS))
            else:
                self._add(step, summary=self._make.scalar(name, float(value)))
        if time.monotonic() - self._flushed > FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def text(self, step: int, name: str, value: str) -> None:
        """Adds a text, which is shown as it is: it is no Markdown."""
        indented = "\n".join(f"    {line}" for line in value.splitlines())
        self._add(step, summary=self._make.text(name, indented))

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))
