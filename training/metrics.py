"""Metrics of a run: lines of JSON for programs, and what a config names for people, such as TensorBoard."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from partitioning.errors import UserError
from training.boards import Board, Boards

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


class MetricWriter:
    """Writes a run's figures to `metrics.jsonl` in its folder, and to the boards that a config names.

    The first process writes; the others' calls do nothing. A line is `{"step": ..., name: value, ...}`; arrays are lists
    there, and histograms on boards.

    Args:
      folder: made if it is not there.
      step: steps done before the first that will be written; what an earlier start wrote after it is dropped, so that
        a resumed run has each step once.
      boards: where else figures go.

    Raises:
      UserError: the folder is a file, or cannot be written to, or a board cannot be opened.
    """

    def __init__(self, folder: str | os.PathLike, *, step: int = 0, boards: Sequence[Boards] = ()):
        self.folder = Path(folder)
        self._file: Any = None
        self._boards: list[Board] = []
        if jax.process_index() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_until(self.folder / FILE, step)
            self._file = (self.folder / FILE).open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder}: metrics cannot be written there: {error.strerror}") from None
        try:
            for board in boards:
                self._boards.append(board.open(self.folder, step=step))
        except BaseException:
            with suppress(UserError):
                self.close(failed=True)
            raise

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Appends one step's figures: numbers, or arrays of no axes or one (waits for them).

        Args:
          step: steps done, this one included.
          figures: by name; names with "/" are grouped by boards.

        Raises:
          UserError: the disk is full.
        """
        if self._file is None:
            return
        values = {name: _json(value) for name, value in figures.items()}
        with self._one_line():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
            for board in self._boards:
                board.add(step, values)

    def text(self, name: str, value: str, *, step: int = 0) -> None:
        """Adds a text, such as the config, to the boards.

        Raises:
          UserError: the disk is full.
        """
        with self._one_line():
            for board in self._boards:
                board.text(step, name, value)

    def close(self, *, failed: bool = False) -> None:
        """Flushes and closes all.

        Args:
          failed: whether an error ended the run, which boards may show.

        Raises:
          UserError: the disk is full.
        """
        file, boards, self._file, self._boards = self._file, self._boards, None, []
        if file is None:
            return
        try:
            # Each is closed, whatever another one raises.
            with ExitStack() as stack:
                for board in boards:
                    stack.callback(board.close, failed=failed)
                stack.callback(file.close)
        except OSError as error:
            raise self._unwritten(error) from None

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffers is not tried again at the end.
            with suppress(UserError):
                self.close(failed=True)
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self.folder / FILE}: metrics cannot be written: {error.strerror}")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended the run is said, not what that entails.
        with suppress(UserError) if kind else nullcontext():
            self.close(failed=kind is not None)
