"""How many tokens a second the reader gives from a prepared cache, on one core, beside preparing it.

    python -m benchmarks.reader

Documents of log-normal lengths (median 300 bytes), 24 million bytes, packed in rows of 512; one pass over two epochs.
"""

import argparse
import os
import tempfile
import time

import numpy as np

import data
from data.sources import InMemory


def measure(length: int, batch_size: int, million: int) -> None:
    """Prepare a synthetic corpus and print the rates."""
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
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        data.prepare(task, folder)
        print(f"prepare: {total / 1e6 / (time.perf_counter() - begin):.1f} M bytes/s")
        reader = data.Cached(task=task, folder=folder).open()
        begin = time.perf_counter()
        rows = reader.rows(length=length)
        print(f"planning {len(examples):,} documents into {rows:,} rows: {time.perf_counter() - begin:.2f} s")
        used, seconds = 0, []
        for step in range(2 * rows // batch_size):
            begin = time.perf_counter()
            batch = reader.batch(step, batch_size=batch_size, length=length, seed=0)
            seconds.append(time.perf_counter() - begin)
            used += int((batch["segments"] > 0).sum())
        taken = np.array(seconds)
        size = batch_size * length
        print(
            f"reading: {len(taken) * size / taken.sum() / 1e6:.1f} M tokens/s over two epochs, "
            f"batch of {size:,} tokens: median {1e3 * np.median(taken):.2f} ms, worst {1e3 * taken.max():.1f} ms, "
            f"{100 * used / (len(taken) * size):.2f} % of the positions filled"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--million", type=int, default=24)
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure(given.length, given.batch_size, given.million)
