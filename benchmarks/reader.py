"""How many tokens a second the reader gives from a prepared cache, beside preparing it.

    python -m benchmarks reader

Documents of log-normal lengths (median 300 bytes), 24 million bytes, packed in rows of 512, batches of 64 rows; one thread
reads two epochs in order.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.harness import Contestant, alternate

LENGTH, ROWS, MILLION = 512, 64, 24


def reading(length: int, batch_size: int, million: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Contestant: the next batch, with the rates of preparing in its facts."""
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
    prepared = time.perf_counter() - begin
    reader = data.Cached(task=task, folder=folder.name).open()
    begin = time.perf_counter()
    rows = reader.rows(length=length)
    facts = {
        "prepare": total / 1e6 / prepared,
        "documents": len(examples),
        "rows": rows,
        "plan": time.perf_counter() - begin,
    }
    count = iter(range(1 << 40))

    def turn(folder: Any = folder) -> None:
        # The default keeps the folder for as long as there are turns.
        del folder
        reader.batch(next(count) % (2 * rows // batch_size), batch_size=batch_size, length=length, seed=0)

    return turn, facts


def main() -> None:
    """Measures and writes the section."""
    name = "a batch"
    found = alternate([Contestant(name, __name__, "reading", length=LENGTH, batch_size=ROWS, million=MILLION)])
    facts, size = found.facts[name], LENGTH * ROWS
    rows = [
        ("reading", f"{size / found.seconds(name) / 1e6:.0f} M tokens/s ({1e3 * found.seconds(name):.2f} ms a batch)"),
        ("preparing", f"{facts['prepare']:.1f} M bytes/s"),
        (f"packing {facts['documents']:,} documents into {facts['rows']:,} rows", f"{facts['plan']:.2f} s"),
    ]
    body = "\n".join(
        [(__doc__ or "").split("\n\n")[-1].strip(), "", results.table(("work", "rate"), rows), "", f"{found.note()}."]
    )
    results.write("reader", "The reader", body)
