"""How many tokens a second the reader gives from a prepared cache, on one core.

    python -m benchmarks reader

Documents of log-normal lengths (median 300 bytes), 50 million tokens, packed in rows of 512, batches of 64 rows, one thread
on one core, which decompresses too. Three readings of 'from a cache': the block of rows that a batch is from is decoded and
packed already; a whole epoch of a reader newly opened, whose files the operating system holds, so that each block is
decompressed and packed once; and the same with the files' pages dropped first, so that they come from the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate

LENGTH, ROWS, MILLION = 512, 64, 50
KINDS = {
    "held": "rows of a block that the reader holds",
    "read": "an epoch, files in memory",
    "dropped": "an epoch, files on the disk",
}
GOALS = {"held": 50, "read": 50, "dropped": 20}


def on_one_core() -> None:
    """Keeps this process, and the threads that it will start, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def reading(kind: str, length: int, batch_size: int, million: int) -> tuple[Callable[[], float], dict[str, Any]]:
    """Contestant: seconds of a batch, read one of these ways; the rate of preparing in its facts."""
    on_one_core()
    import data
    from data.sources import InMemory

    draw = np.random.default_rng(0)
    words = np.array(["data", "the", "of", "matrix", "gradient", "token", "a", "is", "mesh", "step"])
    examples: list[dict[str, str]] = []
    total = 0
    while total < million * 1_000_000:
        size = int(draw.lognormal(np.log(300), 1.0)) + 1
        text = " ".join(words[draw.integers(0, len(words), size // 5 + 1)])[:size]
        examples.append({"text": text})
        total += len(text)
    task = data.Task(name="benchmark", train=InMemory(tuple(examples)))
    folder = tempfile.TemporaryDirectory()
    begin = time.perf_counter()
    data.prepare(task, folder.name)
    facts: dict[str, Any] = {"prepare": total / 1e6 / (time.perf_counter() - begin), "documents": len(examples)}
    open_ = data.Cached(task=task, folder=folder.name).open
    held = open_()
    begin = time.perf_counter()
    facts["rows"] = held.rows(length=length)
    facts["plan"] = time.perf_counter() - begin

    def batches(reader: Any, first: int, last: int) -> float:
        begin = time.perf_counter()
        for step in range(first, last):
            reader.batch(step, batch_size=batch_size, length=length, seed=0)
        return (time.perf_counter() - begin) / (last - first)

    def turn(folder: Any = folder) -> float:
        # The default keeps the folder for as long as there are turns.
        if kind == "held":
            return batches(held, 0, 4)
        if kind == "dropped":
            _drop(folder.name)
        reader = open_()
        # What packing every window takes is told apart.
        reader.rows(length=length)
        return batches(reader, 0, facts["rows"] // batch_size)

    return turn, facts


def _drop(folder: str) -> None:
    """Takes the files' pages out of the operating system's memory."""
    for file in Path(folder).rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measures and writes the section."""
    found = {
        kind: alternate(
            [Contestant(kind, __name__, "reading", kind=kind, length=LENGTH, batch_size=ROWS, million=MILLION)],
            wanted=5,
            times=None if kind == "held" else 1,
        )
        for kind in KINDS
    }
    rows = []
    for kind, words in KINDS.items():
        seconds = found[kind].seconds(kind)
        rate = f"{LENGTH * ROWS / seconds / 1e6:.0f} M tokens/s ({1e3 * seconds:.2f} ms a batch)"
        rows.append((words, rate, f"{GOALS[kind]} M"))
    facts = found["held"].facts["held"]
    rows += [
        ("preparing, as bytes", f"{facts['prepare']:.1f} M bytes/s", ""),
        (f"packing {facts['documents']:,} documents into {facts['rows']:,} rows", f"{facts['plan']:.2f} s", ""),
    ]
    body = "\n".join(
        [
            (__doc__ or "").split("\n\n")[-1].strip(),
            "",
            results.table(("work", "rate", "goal"), rows),
            "",
            *(f"- {KINDS[kind]}: {pair.note()}." for kind, pair in found.items()),
        ]
    )
    results.write("reader", "The reader", body)
