"""What goes wrong with checkpoints, in one line each: a full disk, a broken folder, a write that failed on one host."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from partitioning.errors import UserError

POLL_S = 0.005
_NO_ROOM = ("ENOSPC", "No space left", "EDQUOT", "quota exceeded", "EFBIG", "File too large")
_NOT_ALLOWED = ("EACCES", "Permission denied", "EROFS", "Read-only file system", "PERMISSION_DENIED")


class BrokenError(Exception):
    """A checkpoint that cannot be restored whole; the message says what is wrong with it."""


@contextmanager
def writing(folder: Any) -> Iterator[None]:
    """Turns a full or forbidden disk, wherever Orbax met it, into one line.

    Raises:
      UserError: for these; anything else is raised as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if any(sign in text for sign in _NO_ROOM):
            raise UserError(
                f"{folder}: no room on the disk for the checkpoint; the earlier ones are whole: free some space, or "
                "keep fewer"
            ) from error
        if any(sign in text for sign in _NOT_ALLOWED) or isinstance(error, (NotADirectoryError, FileExistsError)):
            raise UserError(f"{folder}: cannot be written to: {error}") from error
        raise


class Background:
    """Hears what Orbax's threads met, which they log with a traceback, and raises it in the thread that waits for them.

    Of several hosts, one whose write failed and one whose write did not wait for each other in different places, and
    Orbax raises nothing before both have waited for minutes.

    Args:
      folder: of the checkpoints that are written; what befalls those of another folder is for others to hear.
    """

    def __init__(self, folder: Any) -> None:
        self.error: BaseException | None = None
        self._ours = re.compile(rf"{re.escape(str(folder))}/\d")
        logging.getLogger("absl").addFilter(self._hear)

    def _hear(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or "orbax" not in record.pathname:
            return True
        if "async_checkpointer" not in record.pathname:
            return False
        text = record.getMessage()
        # A filter that says no is the last one asked.
        if "directory: " in text and not self._ours.search(text):
            return True
        self.error = self.error or record.exc_info[1]
        return False

    @property
    def hangs(self) -> bool:
        """Whether a write did not end in time, by Orbax's clock or ours."""
        return isinstance(self.error, TimeoutError)

    def wait(self, manager: Any, *, timeout_s: float) -> None:
        """Waits for the manager's write under way.

        Args:
          manager: Orbax's.
          timeout_s: how long, in seconds.

        Raises:
          UserError: it takes longer; nobody waits for it again.
          Exception: what it met.
        """
        deadline = time.monotonic() + timeout_s
        while manager.is_saving_in_progress() and self.error is None:
            if time.monotonic() > deadline:
                self.error = TimeoutError()
            time.sleep(POLL_S)
        if self.hangs:
            raise UserError(
                f"{manager.directory}: a checkpoint was not written in {timeout_s:g} s; the earlier ones are whole: does "
                "the disk answer?"
            ) from self.error
        if self.error is not None and jax.process_count() > 1:
            raise self.error
        manager.wait_until_finished()
        manager.check_for_errors()

    def close(self) -> None:
        """Listens no more."""
        logging.getLogger("absl").removeFilter(self._hear)
