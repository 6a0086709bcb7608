"""Metrics of a run: lines of JSON for programs, TensorBoard events for people."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from partitioning.errors import UserError

FILE = "metrics.jsonl"


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


def _number(value: Any) -> float | int | str:
    """A scalar as JSON can hold it; what is not finite becomes the string that `float` reads."""
    number = value if isinstance(value, (int, float)) else jax.device_get(value).item()
    return number if isinstance(number, int) or math.isfinite(number) else str(number)


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


class MetricWriter:
    """Writes a run's scalars to `metrics.jsonl` and to TensorBoard event files in the same folder.

    The first process writes; the others' calls do nothing. A line is `{"step": ..., name: value, ...}`.

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
        from tensorboardX import SummaryWriter

        # Events cannot be cut; a purge step makes readers forget those after it. File names begin with the second they
        # were made in and are read in order: the suffix keeps a start within the same second apart, and behind.
        suffix = f".{step:012d}.{os.getpid()}.{time.time_ns()}"
        purge = step + 1 if step else None
        self._events = SummaryWriter(str(self.folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one step's scalars; numbers or arrays of no axes (waits for them).

        Args:
          step: steps done, this one included.
          scalars: by name; names with "/" are grouped by TensorBoard.

        Raises:
          UserError: the disk is full.
        """
        if self._file is None:
            return
        values = {name: _number(value) for name, value in scalars.items()}
        try:
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, float(value), step)
        except OSError as error:
            raise UserError(f"{self.folder / FILE}: metrics cannot be written: {error.strerror}") from None

    def text(self, name: str, value: str, *, step: int = 0) -> None:
        """Adds a text, such as the config, to the TensorBoard events."""
        if self._events is not None:
            self._events.add_text(name, value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
            self._events.close()
            self._file = self._events = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
