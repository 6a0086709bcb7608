"""Metrics of a run: lines of JSON for programs, TensorBoard events for people."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from partitioning.errors import UserError

FILE = "metrics.jsonl"
FLUSH_S = 60.0
"""Between two flushes of TensorBoard's file; that for programs is flushed at every line."""
BINS = 30
"""Of a histogram."""


def group_norms(flat: Mapping[str, Array], *, depth: int = 2) -> dict[str, Float[Array, ""]]:
    """The Euclidean norm of each group of leaves, in float32; for the inside of a jitted step.

    Args:
      flat: parameters, gradients or updates by path.
      depth: how many components of the path name a group: tree and top-level module.
    """
    sums: dict[str, Array] = {}
    for name in sorted(flat):
        modules = name.split("/")[:-1] or [name]
        group = "/".join(modules[:depth])
        square = jnp.sum(jnp.square(flat[name].astype(jnp.float32)))
        sums[group] = sums[group] + square if group in sums else square
    return {group: jnp.sqrt(value) for group, value in sums.items()}


def _json(value: Any) -> Any:
    """A number, or an array as a list, as JSON can hold it; what is not finite becomes the string that `float` reads."""
    value = value if isinstance(value, (int, float)) else jax.device_get(value)
    if getattr(value, "ndim", 0):
        # Six digits: a line may have thousands of them.
        return [_json(float(f"{number:.6g}")) for number in value.ravel()]
    number = value if isinstance(value, (int, float)) else value.item()
    return number if isinstance(number, int) or math.isfinite(number) else str(number)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes figures by name into a file of their own.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.write_text(json.dumps({name: _json(value) for name, value in figures.items()}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of a metrics file after `step`, and a line that a kill cut short.

    The new file is written aside and then takes the old one's place.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)


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
        """Adds a text."""
        self._add(step, summary=self._make.text(name, value))

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))


class MetricWriter:
    """Writes a run's figures to `metrics.jsonl` and to TensorBoard event files in the same folder.

    The first process writes; the others' calls do nothing. A line is `{"step": ..., name: value, ...}`; arrays are lists
    there, and histograms in TensorBoard.

    Args:
      folder: made if it is not there.
      step: steps done before the first that will be written; what an earlier start wrote after it is dropped, so that
        a resumed run has each step once.

    Raises:
      UserError: the folder is a file, or cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike, *, step: int = 0):
        self.folder = Path(folder)
        self._file: Any = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_until(self.folder / FILE, step)
            self._file = (self.folder / FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder}: metrics cannot be written there: {error.strerror}") from None
        # Events cannot be cut; a purge step makes readers forget those after it. File names begin with the second they
        # were made in and are read in order: the suffix keeps a start within the same second apart, and behind.
        suffix = f".{step:012d}.{os.getpid()}.{time.time_ns()}"
        self._events = Events(self.folder, suffix, purge=step + 1 if step else None)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Appends one step's figures: numbers, or arrays of no axes or one (waits for them).

        Args:
          step: steps done, this one included.
          figures: by name; names with "/" are grouped by TensorBoard.

        Raises:
          UserError: the disk is full.
        """
        if self._file is None:
            return
        values = {name: _json(value) for name, value in figures.items()}
        try:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            self._events.add(step, values)
        except OSError as error:
            # What is left in the buffers is not tried again at the end.
            with suppress(UserError):
                self.close()
            raise self._unwritten(error) from None

    def text(self, name: str, value: str, *, step: int = 0) -> None:
        """Adds a text, such as the config, to the TensorBoard events."""
        if self._events is not None:
            self._events.text(step, name, value)

    def close(self) -> None:
        """Flushes and closes both.

        Raises:
          UserError: the disk is full.
        """
        file, events, self._file, self._events = self._file, self._events, None, None
        if file is None:
            return
        try:
            with closing(events):
                file.close()
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self.folder / FILE}: metrics cannot be written: {error.strerror}")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run is said, not what that entails.
        with suppress(UserError) if kind else nullcontext():
            self.close()
