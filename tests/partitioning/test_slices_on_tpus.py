"""A step compiles for slices of real TPUs, and sends sums alone from one to the other; needs the extra `tpu`, and no TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_only_sums_cross_slices():
    place = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(TESTS / "slices_on_tpus.py")],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == ["ALL_REDUCE"]
