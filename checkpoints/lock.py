"""A folder that one run at a time may write to."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from partitioning.errors import UserError

log = logging.getLogger(__name__)
FILE = ".in_use"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a run's folder to this process for the block; of several hosts, the first holds it for all.

    The operating system lets go of the lock when the process ends, however it ends, also over NFS: a killed run leaves
    none behind. The file stays, and says who held it last; a folder that was made for it and got nothing else is removed.

    Args:
      folder: made if it is not there.

    Raises:
      UserError: another process holds it.
    """
    if jax.process_index():
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: in use by {file.read().strip() or 'another process'}: wait for its end, or use another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            log.warning("%s: this file system has no locks: let no other run write there", folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [FILE]:
                (folder / FILE).unlink()
                folder.rmdir()
