"""What a board is: a place where people look at a run's figures, beside the file that programs read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Board(Protocol):
    """An open board. A call that meets a full disk raises `OSError`."""

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds figures by name, at one step: numbers, or lists of numbers; what is not finite is a string."""

    def text(self, step: int, name: str, value: str) -> None:
        """Adds a text."""

    def close(self, *, failed: bool) -> None:
        """Flushes and closes; `failed` says that an error ended the run."""


class Boards(Protocol):
    """What a config names: it opens one board for each run."""

    def check(self) -> None:
        """Raises `UserError` where the board cannot be written to on this machine; called before anything is made."""

    def open(self, folder: Path, *, step: int) -> Board:
        """Opens a run's board, or goes on with it.

        Args:
          folder: of the run.
          step: steps done; what an earlier start wrote after it no longer counts.
        """
