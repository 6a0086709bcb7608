"""An object of a bucket that one process at a time holds: what a lock is to a folder of the file system."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from partitioning.errors import UserError

log = logging.getLogger(__name__)
FILE = ".in_use"
BEAT_S = 10.0
SILENT_S = 45.0


class Lease:
    """Holds a run's folder in a bucket, until it is let go or its process dies.

    A bucket has no locks, but writes an object only where it still is as one says (`if_generation_match`). The holder writes
    it anew every `BEAT_S`; where it has stood still for `SILENT_S` the holder is gone, and the next one takes it. No clock of
    another machine is read. A holder that was cut off for so long finds out before its next checkpoint (`check`).

    Args:
      bucket: of `google.cloud.storage`.
      name: the object's.
      folder: as users call it.
      say: takes a line where there is something to wait for.

    Raises:
      UserError: another process holds it.
    """

    def __init__(self, bucket: Any, name: str, folder: str, say: Callable[[str], None]):
        self._bucket, self._name, self._folder = bucket, name, folder
        self._who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self._generation = 0
        self._alone, self._over = threading.Lock(), threading.Event()
        self._take(say)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _take(self, say: Callable[[str], None]) -> None:
        seen, since, generation = 0, 0.0, 0
        while not self._write(generation):
            blob = self._bucket.get_blob(self._name)
            now, generation = time.monotonic(), 0
            if blob is None:
                continue
            who = blob.download_as_text().splitlines()[0]
            if not seen:
                seen, since = blob.generation, now
                say(f"{self._folder}: was in use by {who}: waits {SILENT_S:.0f} s to see whether it still is")
            elif blob.generation != seen:
                raise UserError(f"{self._folder}: in use by {who}: wait for its end, or use another folder")
            elif now - since > SILENT_S:
                generation = seen
                continue
            time.sleep(BEAT_S / 10)

    def _write(self, generation: int) -> bool:
        """Writes the object where it is of this generation (0: not there); whether it was."""
        from google.api_core.exceptions import PreconditionFailed

        text = f"{self._who}\n{uuid.uuid4()}\n"
        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(text, if_generation_match=generation)
        except PreconditionFailed:
            # A write whose answer was lost is tried again, and then finds itself.
            blob = self._bucket.get_blob(self._name)
            if blob is None or blob.download_as_text() != text:
                return False
        self._generation = blob.generation
        return True

    def check(self) -> None:
        """Returns where this process still holds the folder.

        Raises:
          UserError: another one has it.
        """
        with self._alone:
            if not self._write(self._generation):
                raise UserError(
                    f"{self._folder}: this process was cut off from the bucket for so long that another one took the folder over"
                )

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                self.check()
            except UserError as error:
                # The next checkpoint says it too, and ends the run.
                log.warning("%s", error)
                return
            except Exception as error:
                log.warning("%s: the bucket cannot be reached, trying on: %s", self._folder, error)

    def release(self) -> None:
        """Lets it go, where this process still has it."""
        self._over.set()
        self._thread.join()
        with self._alone:
            if self._write(self._generation):
                self._bucket.blob(self._name).delete(if_generation_match=self._generation)
