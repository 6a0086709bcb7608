"""The cache: tokenised columns in a tensorstore folder, whole or not there at all.

    <folder>/manifest.json  tokenizer.json  [tokenizer.model]  <split>/<column>/{values,bounds[,inner][,counts]}/

Each array is one-dimensional zarr3 in chunks. A column's `values` are flat; `bounds` say where an example's items
begin, and for lists of texts `inner` says where each text begins; of texts `counts` has how often each id occurs.
Examples lie in a seeded shuffled order, so that any contiguous window is a random sample and an epoch needs no more
than windows in a random order. The manifest is written last and lists every file with its size. `data.cache_writing`
writes it; here it is read.
"""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from data.columns import TEXTS
from data.saved_tokenizers import from_files
from data.tokenizers import Tokenizer
from partitioning.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


def is_remote(path: str) -> bool:
    """Whether a path names a bucket rather than a local folder."""
    return path.startswith("gs://")


def kvstore(path: str) -> dict[str, Any]:
    """The tensorstore key-value store of a local folder or of `gs://bucket/path`."""
    if is_remote(path):
        bucket, _, inside = path.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": inside.rstrip("/") + "/" if inside else ""}
    return {"driver": "file", "path": os.path.abspath(os.path.expanduser(path)) + "/"}


def join(folder: str, *parts: str) -> str:
    """A path below a local or remote folder."""
    return "/".join([folder.rstrip("/"), *parts])


def store(path: str) -> Any:
    """The open key-value store of a folder."""
    import tensorstore as ts

    return ts.KvStore.open(kvstore(path)).result()


def read_file(folder: str, name: str) -> bytes | None:
    """The content of a file, or None when there is none.

    Errors: UserError naming the file when it is there and cannot be read, or the bucket cannot be reached.
    """
    try:
        if not is_remote(folder):
            return Path(folder, name).expanduser().read_bytes()
        got = store(folder).read(name).result()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{join(folder, name)}: cannot be read: {reason(error)}") from None
    return got.value if got.state == "value" else None


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of a cache, or None where no cache is.

    Errors: UserError naming the file when it does not parse or is of another format.
    """
    recover(folder)
    data = read_file(folder, MANIFEST)
    if data is None:
        return None
    name = join(folder, MANIFEST)
    try:
        manifest = json.loads(data)
        found = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{name}: broken manifest; prepare again with overwrite") from None
    if found != FORMAT:
        raise UserError(f"{name}: cache format {found}, this version reads {FORMAT}; prepare again with overwrite")
    return manifest


class CacheSplit:
    """One split of a cache, open for reading."""

    def __init__(self, folder: str, split: str, manifest: Mapping[str, Any]):
        import tensorstore as ts

        entry = manifest["splits"][split]
        self.path = join(folder, split)
        self.examples: int = entry["examples"]
        self.window: int = entry["window"]
        self.columns: dict[str, dict[str, Any]] = entry["columns"]
        self.kinds = {name: column["kind"] for name, column in self.columns.items()}
        self.largest = {name: column["largest"] for name, column in self.columns.items()}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
        self._values = {name: self._open(f"{name}/values", c["values"]) for name, c in self.columns.items()}
        self._bounds: dict[str, np.ndarray] = {}
        self._inner: dict[str, np.ndarray] = {}

    def _open(self, array: str, length: int) -> Any:
        import tensorstore as ts

        spec = {"driver": "zarr3", "kvstore": kvstore(join(self.path, array))}
        try:
            found = ts.open(spec, open=True, read=True, context=self._context).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{join(self.path, array)}: cannot be opened ({reason(error)}); prepare again") from None
        if found.shape != (length,):
            raise UserError(
                f"{join(self.path, array)}: {found.shape[0]} values, the manifest says {length}; prepare again"
            )
        return found

    def _read(self, array: Any, name: str) -> np.ndarray:
        try:
            return array.read().result()
        except (ValueError, OSError) as error:
            raise UserError(f"{join(self.path, name)}: cut short or damaged ({reason(error)}); prepare again") from None

    def bounds(self, name: str) -> Int[np.ndarray, " N_and_1"]:
        """See `Split`."""
        if name not in self._bounds:
            self._bounds[name] = self._read(self._open(f"{name}/bounds", self.examples + 1), f"{name}/bounds")
        return self._bounds[name]

    def inner(self, name: str) -> Int[np.ndarray, " sequences_and_1"]:
        """See `Split`."""
        if name not in self._inner:
            count = self.columns[name]["sequences"] + 1
            self._inner[name] = self._read(self._open(f"{name}/inner", count), f"{name}/inner")
        return self._inner[name]

    def counts(self, name: str, vocabulary: int) -> Int[np.ndarray, " V"]:
        """See `Split`. Errors: UserError when an older version made the cache, which did not count."""
        if not counted(self.columns[name]):
            raise UserError(
                f"{self.path}/{name}: made by an older version, which did not count how often each token occurs; prepare again "
                "with --overwrite"
            )
        return self._read(self._open(f"{name}/counts", vocabulary), f"{name}/counts")

    def values(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, " values"]:
        """See `Split`."""
        return self._read(self._values[name][start:stop], f"{name}/values")


def counted(column: Mapping[str, Any]) -> bool:
    """Whether a column of a manifest has all that this version writes: of texts, how often each id occurs."""
    return "counts" in column or column["kind"] not in TEXTS


class Cache:
    """A prepared cache, checked and open for reading.

    Arguments:
        folder: the folder of the cache, local or `gs://`.

    Errors: UserError naming the folder when there is no cache, or the file when one is missing or cut short, or when
    the tokenizer beside it is not the one the cache was made with (both are named).
    """

    def __init__(self, folder: str):
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: no prepared cache here; run `palmette prepare` first")
        self.folder, self.manifest = folder, manifest
        self._check_files()
        names = ("tokenizer.json", "tokenizer.model")
        found = {name: read_file(folder, name) for name in names}
        self.tokenizer: Tokenizer = from_files({n: d for n, d in found.items() if d is not None}, folder)
        made_with, beside = manifest["tokenizer"]["identity"], self.tokenizer.identity
        if made_with != beside:
            raise UserError(
                f"{folder}: made with tokenizer {made_with[:12]}, the one beside it is {beside[:12]}; prepare again"
            )

    def _check_files(self) -> None:
        for split, entry in self.manifest["splits"].items():
            base = join(self.folder, split)
            if is_remote(self.folder):
                present = {key.decode() for key in store(base).list().result()}
                missing = sorted(set(entry["files"]) - present)
                if missing:
                    raise UserError(f"{join(base, missing[0])}: missing from the cache; prepare again with overwrite")
                continue
            for name, size in entry["files"].items():
                file = Path(base, name)
                actual = file.stat().st_size if file.is_file() else None
                if actual != size:
                    what = "missing from the cache" if actual is None else f"{actual} bytes, the manifest says {size}"
                    raise UserError(f"{file}: {what}: the cache was cut short; prepare again with overwrite")

    def split(self, name: str) -> CacheSplit:
        """Open a split. Errors: UserError naming the splits there are."""
        if name not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder}: no split {name!r}; there is {there}")
        return CacheSplit(self.folder, name, self.manifest)


def reason(error: BaseException) -> str:
    """What went wrong, without a library's own details."""
    # tensorstore appends the source lines of its own code in brackets.
    text = str(error).split(" [")[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text


def siblings(folder: str) -> tuple[Path, Path, str]:
    """A local cache, where its predecessor waits while it is replaced, and how names of half-written ones begin."""
    final = Path(os.path.abspath(os.path.expanduser(folder)))
    return final, final.with_name(f".{final.name}.replaced"), f".{final.name}.part-{platform.node()}-"


def recover(folder: str) -> None:
    """Put back the old cache when a replacement was killed between its two renames."""
    if is_remote(folder):
        return
    final, replaced, _ = siblings(folder)
    if replaced.is_dir() and not final.exists():
        os.replace(replaced, final)
