"""A folder has one writer at a time, and a dead one leaves no lock behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.lock import FILE, held
from partitioning import UserError

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from checkpoints.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_it_is_dead(tmp_path):
    out = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .* since 20"), held(out):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with held(out):
        assert str(os.getpid()) in (out / FILE).read_text()
    with held(out):
        pass
