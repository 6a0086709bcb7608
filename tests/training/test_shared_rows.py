"""Hosts whose devices share every row read the same rows, and train as one host does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from running import metrics

TESTS = Path(__file__).parents[1]


def train(out, hosts):
    """The script on so many hosts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "training")))
    words = [sys.executable, str(Path(__file__).with_name("shared_rows.py"))]
    started = [
        subprocess.Popen(
            [*words, str(host), str(hosts), port, str(out)],
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


@pytest.mark.long
def test_rows_on_the_devices_of_two_hosts(tmp_path):
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one.keys() == two.keys()
    for step, row in one.items():
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=2e-5)
        assert two[step]["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=2e-5)
