"""Writing a cache: in a shuffled order, in bounded memory, and under its name only when it is whole."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.cache import FORMAT, MANIFEST, is_remote, join, kvstore, reason, recover, siblings, store
from data.columns import TEXTS, Column, Tokenized, offsets, reordered
from data.shards import tokenise
from data.shuffle import permutation
from data.sources import Source
from data.tokenizers import Tokenizer
from partitioning.errors import UserError

CHUNK = 1 << 17
SHUFFLE_SEED = 20_260_101
WINDOW_VALUES = 1 << 19
SHARDS = "shards"


class _Appender:
    """Writes one array front to back in whole chunks."""

    def __init__(self, path: str, length: int, dtype: np.dtype):
        import tensorstore as ts

        spec = {
            "driver": "zarr3",
            "kvstore": kvstore(path),
            "metadata": {
                "shape": [length],
                "data_type": dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [CHUNK]}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "zstd", "configuration": {"level": 3}},
                ],
            },
        }
        self._array = ts.open(spec, create=True, delete_existing=True).result()
        self._held: list[np.ndarray] = []
        self._size = 0
        self._at = 0
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        self._digest.update(np.ascontiguousarray(values).tobytes())
        self._held.append(values)
        self._size += len(values)
        if self._size >= 4 * CHUNK:
            self._flush(self._size - self._size % CHUNK)

    def _flush(self, count: int) -> None:
        if not count:
            return
        held = np.concatenate(self._held)
        self._array[self._at : self._at + count].write(held[:count]).result()
        self._held, self._size, self._at = [held[count:]], len(held) - count, self._at + count

    def close(self) -> str:
        self._flush(self._size)
        return self._digest.hexdigest()


def _write_array(path: str, values: np.ndarray) -> str:
    appender = _Appender(path, len(values), values.dtype)
    appender.append(values)
    return appender.close()


def write_split(folder: str, columns: Mapping[str, Column], text_bytes: int, vocabulary: int) -> dict[str, Any]:
    """Write one split in a shuffled order and return its entry in the manifest; `vocabulary` is the number of ids."""
    examples = len(next(iter(columns.values())).counts)
    order = permutation([SHUFFLE_SEED, examples], examples)
    entry: dict[str, Any] = {"examples": examples, "text_bytes": text_bytes, "columns": {}}
    for name, column in columns.items():
        counts, sizes, groups = reordered(column, order)
        digests = [_write_array(join(folder, name, "bounds"), offsets(counts))]
        if sizes is not None:
            digests.append(_write_array(join(folder, name, "inner"), offsets(sizes)))
        values = _Appender(join(folder, name, "values"), len(column.values), column.values.dtype)
        counts_of_ids = np.zeros(vocabulary, np.int64)
        for group in groups:
            values.append(group)
            if column.kind in TEXTS:
                counts_of_ids += np.bincount(group, minlength=vocabulary)
        digests.append(values.close())
        entry["columns"][name] = {
            "kind": column.kind,
            "values": len(column.values),
            "largest": int(counts.max(initial=0)),
            "content": hashlib.sha256("".join(digests).encode()).hexdigest(),
            **({} if sizes is None else {"sequences": len(sizes)}),
        }
        # No part of the content, from which it follows.
        if column.kind in TEXTS:
            entry["columns"][name]["counts"] = _write_array(join(folder, name, "counts"), counts_of_ids)
    total = sum(c["values"] for c in entry["columns"].values())
    # About the same number of values a window, whatever the documents' length.
    entry["window"] = int(np.clip(WINDOW_VALUES * examples // max(total, 1), 16, 4096))
    entry["files"] = _sizes(folder)
    return entry


def _sizes(folder: str) -> dict[str, int]:
    if is_remote(folder):
        return {key.decode(): 0 for key in sorted(store(folder).list().result())}
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}


def write(
    folder: str,
    *,
    task: str,
    identity: Mapping[str, Any],
    tokenizer: Tokenizer,
    tag: str,
    splits: Mapping[str, Source],
    processes: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokenise the splits and write a cache, which appears under its name only when it is whole.

    What a writer that was killed or interrupted on this machine had tokenised is used again where its records are the
    same; in a bucket it is not.

    Arguments:
        folder: where the cache goes; what is there is replaced when the new one is whole.
        task: the task's name.
        identity: what a cache must agree in to be reused; the fingerprints of the sources are added to it.
        tokenizer: trained; `tag` is its short name.
        splits: the source of each split.
        processes: how many tokenise.
        report: takes one line a split, and one now and then meanwhile.

    Errors: UserError naming the folder when it cannot be written (a full disk, a file in the way); nothing is left.
    """
    with _whole(folder) as part, _scratch(part) as scratch:
        entries: dict[str, Any] = {}
        sources: dict[str, str] = {}
        shards = Path(scratch if is_remote(part) else part, SHARDS)
        for name, source in splits.items():
            with ExitStack() as files:
                tokenized = Tokenized(tokenizer, f"{task}, {name}", _scratch_files(Path(scratch, name), files))
                sources[name], speed = tokenise(source, tokenized, shards / name, processes=processes, report=report)
                columns = tokenized.columns(_mapped(tokenized))
                entries[name] = write_split(join(part, name), columns, tokenized.bytes, tokenizer.vocabulary)
            values = sum(c["values"] for c in entries[name]["columns"].values())
            report(f"{task}, {name}: {tokenized.examples:,} examples, {values:,} values, {speed}")
        shutil.rmtree(shards)
        folder_store = store(part)
        for file_name, content in tokenizer.files().items():
            folder_store.write(file_name, content).result()
        manifest = {
            "format": FORMAT,
            "task": task,
            "identity": {**identity, "sources": sources},
            "tokenizer": {"tag": tag, "identity": tokenizer.identity, "vocabulary": tokenizer.vocabulary},
            "splits": entries,
            "content": _content(entries),
            "versions": {name: metadata.version(name) for name in ("numpy", "tensorstore", "sentencepiece")},
        }
        folder_store.write(MANIFEST, json.dumps(manifest, indent=1).encode()).result()
    return manifest


def _scratch(part: str) -> "tempfile.TemporaryDirectory[str]":
    """A folder on the disk that the cache goes to, which is sized for it as the system's temporary one may not be."""
    return tempfile.TemporaryDirectory(prefix="scratch-", dir=None if is_remote(part) else part)


def _scratch_files(folder: Path, opened: ExitStack) -> Callable[[str], BinaryIO]:
    """Values go to disk in the order of the source first: shuffling then needs no more memory than the counts."""
    folder.mkdir()
    return lambda name: opened.enter_context(open(folder / name.replace("/", "_"), "w+b"))


def _mapped(tokenized: Tokenized) -> Callable[[str], np.ndarray]:
    def values(name: str) -> np.ndarray:
        file, dtype = tokenized.files[name], tokenized.dtype(name)
        file.flush()
        return np.memmap(file.name, dtype, mode="r") if file.tell() else np.zeros(0, dtype)

    return values


def _content(entries: Mapping[str, Any]) -> str:
    lines = [f"{split} {entry['examples']} {entry['window']}" for split, entry in sorted(entries.items())]
    lines += [f"{s} {n} {c['content']}" for s, e in sorted(entries.items()) for n, c in sorted(e["columns"].items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def clear_stale(folder: str) -> None:
    """Remove what writers of this cache left that were killed on this machine."""
    if not is_remote(folder):
        for stale in _stale(folder):
            shutil.rmtree(stale, ignore_errors=True)


def _stale(folder: str) -> list[Path]:
    """What dead writers left, newest first."""
    final, _, prefix = siblings(folder)
    found = [p for p in final.parent.glob(f"{glob.escape(prefix)}*") if not _alive(p.name.removeprefix(prefix))]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _adopt(folder: str, part: Path) -> None:
    """Make the folder of this writer, with the shards of the last one that did not come to its end."""
    part.mkdir(exist_ok=True)
    for stale in _stale(folder):
        if stale != part and (stale / SHARDS).is_dir() and not (part / SHARDS).exists():
            os.replace(stale / SHARDS, part / SHARDS)
    for rest in part.iterdir():
        if rest.name != SHARDS:
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    for stale in _stale(folder):
        if stale != part:
            shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def _whole(folder: str) -> Iterator[str]:
    """Give a folder to write into, and move it to its name when the block ends well; remove it when it does not."""
    if is_remote(folder):
        # A bucket has no rename: the manifest, written last, is what makes the cache one.
        try:
            store(folder).delete_range(_everything()).result()
            yield folder
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: the cache cannot be written: {reason(error)}") from error
        return
    final, replaced, prefix = siblings(folder)
    part = final.with_name(f"{prefix}{os.getpid()}")
    interrupted = False
    try:
        if final.exists() and not final.is_dir():
            raise UserError(f"{final}: a file is in the way; name a folder")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            recover(folder)
            _adopt(folder, part)
            yield str(part)
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(final, replaced)
            os.replace(part, final)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{final}: the cache cannot be written: {reason(error)}") from error
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        # As after a kill: what is tokenised waits for the next start.
        if not interrupted:
            shutil.rmtree(part, ignore_errors=True)


def _everything() -> Any:
    import tensorstore as ts

    return ts.KvStore.KeyRange()


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
