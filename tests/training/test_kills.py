"""Kills at random moments, a preemption signal, a full disk: the run goes on as if nothing had been."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from awkward import TRUNK
from running import devices, metrics, record, tiny

from partitioning import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("kill_me.py")
STEPS = 90


class Trainer:
    """Starts runs, one at a time, in processes of their own on one device."""

    def __init__(self):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, out):
        """Begins or goes on; `end` has to follow."""
        self._server.stdin.write(f"{out}\n")
        self._server.stdin.flush()
        self.pid = int(self._server.stdout.readline())

    def end(self, signal_number=None):
        """Sends a signal where one is given, waits, and returns the exit status."""
        if signal_number is not None:
            os.kill(self.pid, signal_number)
        return int(self._server.stdout.readline())

    def close(self):
        """Ends the server."""
        self._server.stdin.close()
        self._server.wait(timeout=60)


@pytest.fixture(scope="module")
def trainer():
    """Shared: its imports take longer than its runs."""
    server = Trainer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """The run that is left alone."""
    out = tmp_path_factory.mktemp("whole") / "run"
    trainer.start(out)
    assert trainer.end() == 0, said(out)
    return out


def said(out):
    """What the last start printed."""
    return Path(f"{out}.said").read_text()


def newest(out):
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdecimal()), default=0)


def wait_for(condition):
    """Until it holds; a minute at most."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


def saved_after(out, step):
    """Whether there is a checkpoint after that of a step."""
    return newest(out) > step


def begun(out):
    """Whether steps after the newest checkpoint are on file."""
    try:
        return max(metrics(out)) > newest(out)
    except (OSError, ValueError):
        return False


def test_ten_kills_and_a_preemption_signal(trainer, whole, tmp_path):
    """SIGKILL while starting, stepping and writing checkpoints, then SIGTERM: the end is that of the run left alone."""
    out, draw, reached = tmp_path / "run", random.Random(1), []
    for kill in range(10):
        before = newest(out)
        trainer.start(out)
        if kill in (0, 5):
            time.sleep(draw.uniform(0.0, 2.0))
        else:
            # After the first step, or after a checkpoint, and then at any moment of the steps and writes that follow.
            wait_for(partial(begun, out) if kill % 2 else partial(saved_after, out, before))
            time.sleep(draw.uniform(0.0, 0.15))
        assert trainer.end(signal.SIGKILL) == -signal.SIGKILL, said(out)
        reached.append(newest(out))
    assert reached == sorted(reached)
    assert len(set(reached)) > 3
    assert reached[-1] < STEPS
    # A signal that asks instead: the step under way is ended and saved.
    before = newest(out)
    trainer.start(out)
    wait_for(partial(saved_after, out, before))
    assert trainer.end(signal.SIGTERM) == 0, said(out)
    stopped = newest(out)
    assert stopped == max(metrics(out)) < STEPS
    assert f"saved at step {stopped}" in said(out)

    trainer.start(out)
    assert trainer.end() == 0, said(out)
    assert not [path for path in (out / "checkpoints").iterdir() if "tmp" in path.name]
    assert record(out, STEPS) == record(whole, STEPS)
    assert metrics(out) == metrics(whole)
    assert len(metrics(out)) == STEPS


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    """The write fails, the earlier checkpoint is whole, and the run goes on once there is room."""
    out, small = tmp_path / "run", {"model": partial(TRUNK, layers=1, width=8)}
    with devices(1):
        tiny("clm", steps=2, **small).train(out)
        kept = record(out, 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = max(path.stat().st_size for path in (out / "checkpoints" / "2").rglob("*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        try:
            with pytest.raises(UserError, match="no room on the disk"):
                tiny("clm", steps=4, **small).train(out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert record(out, 2) == kept
        assert not (out / "checkpoints" / "4").exists()
        tiny("clm", steps=4, **small).train(out)
    assert record(out, 4)["step"] == 4


def test_an_output_folder_that_is_a_file(tmp_path):
    """Named before anything is compiled."""
    (tmp_path / "run").write_text("mine")
    with devices(1), pytest.raises(UserError, match="run is a file"):
        tiny("clm").train(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"
