"""Where a run writes: a folder of the file system, or one in a bucket."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import jax

from checkpoints.lease import FILE, Lease
from checkpoints.lock import held
from checkpoints.reading import in_bucket
from partitioning.errors import UserError

CHECKPOINTS = "checkpoints"


def place(address: str | os.PathLike) -> Path:
    """A folder or file to read: of the file system, or of a bucket by the same methods.

    Raises:
      UserError: no store that is known, or its package is not installed.
    """
    text = str(address)
    if not in_bucket(text):
        return Path(address)
    if not text.startswith("gs://"):
        raise UserError(f"{text}: expected a local folder or gs://BUCKET/FOLDER")
    if find_spec("gcsfs") is None:
        raise UserError(f"{text}: gcsfs is not installed: pip install 'palmette[gcs]'")
    from etils import epath

    return epath.Path(text)


def checkpoints_in(address: str | os.PathLike) -> str:
    """Where a run has its checkpoints: in a bucket, where its folder is."""
    return f"{str(address).rstrip('/')}/{CHECKPOINTS}"


class Folder:
    """A run's folder, and where this process finds its files.

    Args:
      address: as the user named it.
      path: the same; or what stands in for a bucket, where nothing can be appended to, until `keep`.
    """

    def __init__(self, address: str, path: Path):
        self.address, self.path = address, path

    def keep(self) -> None:
        """Brings what was written to where it stays; whatever a checkpoint has behind it is there before it is saved.

        Raises:
          UserError: the bucket cannot be written to, or another process has taken the folder over.
        """

    def soon(self, file: Path) -> None:
        """Brings a small file there in the background, as far as nothing else is on its way."""


class BucketFolder(Folder):
    """A run's folder in a bucket: a folder of this process whose files are copied.

    Checkpoints are not among them: those are written to the bucket itself.

    Args:
      address: gs://BUCKET/FOLDER.
      path: an empty folder.
      say: takes a line where there is something to wait for.

    Raises:
      UserError: no such bucket, nobody who may write there, or another process holds the folder.
    """

    def __init__(self, address: str, path: Path, say: Callable[[str], None]):
        super().__init__(address, path)
        name, _, inside = address.removeprefix("gs://").partition("/")
        self._prefix = f"{inside.strip('/')}/" if inside.strip("/") else ""
        self._known: dict[str, tuple[int, int]] = {}
        self._alone = threading.Lock()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="bucket")
        self._sent: Future | None = None
        self._lease: Lease | None = None
        with reaching(address):
            from google.cloud import storage

            self._client = storage.Client()
            self._bucket = self._client.bucket(name)
            if not jax.process_index():
                # A client of its own: one is not for two threads at once.
                self._lease = Lease(storage.Client().bucket(name), self._prefix + FILE, address, say)
            try:
                self._fetch()
            except BaseException:
                # Nothing is sent: what came by halves would take the place of what is whole.
                with suppress(Exception):
                    self.close()
                raise

    def _fetch(self) -> None:
        """What earlier starts left, checkpoints aside: those have by far the most objects, so they are not even listed."""
        top = self._client.list_blobs(self._bucket, prefix=self._prefix, delimiter="/")
        blobs = list(top)
        for prefix in sorted(top.prefixes):
            if prefix != f"{self._prefix}{CHECKPOINTS}/":
                blobs += self._client.list_blobs(self._bucket, prefix=prefix)
        for blob in blobs:
            name = blob.name.removeprefix(self._prefix)
            if name == FILE or name.endswith("/"):
                continue
            file = self.path / name
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"{self.address}: object {blob.name!r} leaves the folder: remove it")
            file.parent.mkdir(parents=True, exist_ok=True)
            blob.download_to_filename(str(file))
            self._known[name] = _state(file)

    def keep(self) -> None:
        """See `Folder`."""
        with reaching(self.address):
            if self._lease is not None:
                self._lease.check()
            for file in sorted(self.path.rglob("*")):
                # What is written aside has its own name when it is whole.
                if file.is_file() and file.suffix != ".tmp":
                    self._send(file)

    def _send(self, file: Path) -> None:
        name = file.relative_to(self.path).as_posix()
        # What a board has removed meanwhile is no loss.
        with self._alone, suppress(FileNotFoundError):
            # Before it is read: a file that grows meanwhile is sent again.
            state = _state(file)
            if self._known.get(name) != state:
                self._bucket.blob(self._prefix + name).upload_from_filename(str(file))
                self._known[name] = state

    def soon(self, file: Path) -> None:
        """See `Folder`; what fails is tried again by `keep`, which says why."""
        if self._sent is None or self._sent.done():
            self._sent = self._sender.submit(self._send, file)

    def close(self) -> None:
        """Ends the threads, and lets the folder go."""
        self._sender.shutdown()
        if self._lease is not None:
            with reaching(self.address):
                self._lease.release()


@contextmanager
def opened(address: str | os.PathLike, say: Callable[[str], None]) -> Iterator[Folder]:
    """A run's folder, kept to this process for the block; of several hosts, the first holds it for all.

    Args:
      address: local path, made where it is not there, or gs://BUCKET/FOLDER, which needs the extra `gcs`.
      say: takes a line where there is something to wait for.

    Raises:
      UserError: another process holds it, or it cannot be written to.
    """
    path = place(address)
    if not in_bucket(address):
        with held(path):
            yield Folder(str(address), path)
        return
    with tempfile.TemporaryDirectory(prefix="palmette-") as name:
        folder = BucketFolder(str(address).rstrip("/"), Path(name), say)
        try:
            yield folder
        except BaseException:
            # What ended the run is said, not what that entails.
            with suppress(Exception):
                folder.keep()
            with suppress(Exception):
                folder.close()
            raise
        try:
            folder.keep()
        finally:
            folder.close()


@contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turns what a bucket answers, or that it does not answer, into one line.

    Raises:
      UserError: for these; anything else is raised as it is.
    """
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    try:
        yield
    except (GoogleAPICallError, RetryError, GoogleAuthError, RequestException) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{address}: the bucket cannot be reached or written to: {text}") from error


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
