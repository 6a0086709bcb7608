"""A trunk with splash attention compiles for real TPUs; needs the extra `tpu`, and no TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.parametrize("cut", [[], ["cut"]], ids=["whole rows", "cut rows"])
@pytest.mark.parametrize(("backend", "kernels"), [("splash", 6), ("xla", 0)])
def test_the_gradient_has_the_kernels_and_no_matrix(backend, kernels, cut):
    """Three kernels for each of the two blocks of the scan's body, and nothing of queries by keys, where XLA has that."""
    place = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, str(TESTS / "splash_on_tpus.py"), backend, *cut],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {"kernels": kernels, "matrix": not kernels}
