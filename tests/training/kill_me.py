"""Trains a tiny run into the folders that it is told, each in a child that test_kills.py may kill.

Reads folders from its input, one a line. For each it forks, prints the child's id, waits for its end and prints its exit
status (negative: the signal). Forking spares every start the imports; the parent never touches a device.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import numpy as np
from awkward import LENGTH, TRUNK
from running import Toy, tiny

import training.loop  # noqa: F401  (imported before the fork)
from objectives import MaskedLM
from partitioning import data

STEPS, EVERY = 90, 5


def rows(seed: int, count: int) -> dict[str, np.ndarray]:
    """Random text, one document a row."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(6, 37, (count, LENGTH)).astype(np.int32)
    return {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (count, 1)),
        "row": np.arange(count, dtype=np.int32),
    }


def main(out: str) -> None:
    """Trains, and writes what it has to say beside the folder."""
    run = tiny(
        model=partial(TRUNK, layers=1, width=8, dropout=0.1),
        data=Toy(rows),
        objective=MaskedLM(),
        rules=data(),
        steps=STEPS,
        checkpoint_every=EVERY,
        keep=2,
    )
    said = os.open(f"{out}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    run.train(out)


def serve() -> None:
    """One child a line."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                main(line.strip())
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
