"""Tiny runs of the awkward cases, and what they leave on disk."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from awkward import CASES, LENGTH, VOCABULARY, plain_batch

from partitioning import fsdp
from training.guard import Guard
from training.optimizers import AdamW
from training.run import Run


@dataclass(frozen=True, eq=False)
class Toy:
    """Data that a function makes: a reader as much as the loop needs one.

    Args:
      make: from a seed and a number of rows to a batch.
      name: its identity.
      steps: the steps that were asked for, noted.
    """

    make: Callable[..., dict[str, np.ndarray]] = plain_batch
    name: str = "toy"
    steps: list[int] = field(default_factory=list)

    vocabulary = VOCABULARY.size
    specials = SimpleNamespace(**{k: v for k, v in vars(VOCABULARY).items() if k not in ("size", "frequencies")})
    tokenizer = None
    names: Sequence[str] = ()
    weights = {}  # noqa: RUF012

    def open(self):
        """The reader."""
        return self

    def identity(self):
        """See `data.Reader`."""
        return {"task": self.name}

    def spec(self, *, batch_size, length):
        """See `data.Reader`."""
        assert length == LENGTH
        return {name: (value.shape, value.dtype) for name, value in self.make(0, batch_size).items()}

    def planned(self, steps, row):
        """See `data.Reader`."""
        return ()

    def frequencies(self):
        """See `data.Reader`."""
        return np.full(self.vocabulary, 1 / self.vocabulary)

    def epochs(self, row, *, length, seed, control=()):
        """See `data.Reader`."""
        return {}

    def batch(self, step, *, batch_size, length, seed, start=0, host=0, hosts=1, control=()):
        """See `data.Reader`."""
        self.steps.append(step)
        return self.make(1000 * seed + start + step * batch_size, batch_size)


def tiny(name: str = "mlm", **changes: Any) -> Run:
    """An awkward case as a run of four steps with a checkpoint every second and a guard."""
    case = CASES[name]
    asked: dict[str, Any] = {
        "model": case.model,
        "data": Toy(case.batch),
        "objective": case.objective,
        "steps": 4,
        "batch_size": 8,
        "length": LENGTH,
        "optimizer": AdamW(learning_rate=0.01, weight_decay=0.1),
        "rules": fsdp(),
        "guard": Guard(),
        "checkpoint_every": 2,
        "log_every": 1,
        "keep": 10,
    }
    return Run(**(asked | changes))


@contextmanager
def devices(count: int):
    """Only so many devices, for a run that takes all it finds."""
    found = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: found[:count])
        yield


def record(out: Path, step: int) -> dict[str, Any]:
    """A checkpoint's record: shape, dtype and checksum of each leaf, and the metadata."""
    return json.loads((out / "checkpoints" / str(step) / "metadata" / "metadata").read_text())


def metrics(out: Path) -> dict[int, dict[str, Any]]:
    """The metrics file by step, each step once."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row for row in rows if "loss" in row}
    assert len(found) == sum("loss" in row for row in rows)
    return found


def killed_after(step: int, whole: Path, out: Path) -> None:
    """What a kill after a checkpoint leaves of a whole run: later checkpoints gone, later metrics still there."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    # A line that was being written when the kill came.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": ')


def assert_same_end(whole: Path, resumed: Path, last: int) -> None:
    """The last checkpoints agree in every leaf's bits and in the control log, the metrics in every step."""
    assert record(whole, last) == record(resumed, last)
    assert metrics(whole) == metrics(resumed)


def on_hosts(script: str, out: Path, hosts: int) -> None:
    """Runs a script of tests/training as so many hosts of one run: processes that meet over loopback."""
    tests = Path(__file__).parent
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(map(str, (tests.parent, tests, tests / "training")))
    started = [
        subprocess.Popen(
            [sys.executable, str(tests / "training" / script), str(host), str(hosts), port, str(out)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(hosts)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * hosts, "\n".join(said)
