"""A barrier that a process misses ends in time and names it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from checkpoints.barrier import barrier

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys, time
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from checkpoints.barrier import barrier
barrier("both", timeout_s=60)
barrier("both", timeout_s=60)
print("met", flush=True)
if sys.argv[1] == "0":
    try:
        barrier("save 7", timeout_s=1)
    except TimeoutError as error:
        print(error, flush=True)
    import os
    os._exit(0)
sys.stdin.read()
"""


def test_one_process_waits_for_nobody():
    barrier("alone", timeout_s=0.0)


def test_a_missing_process_is_named_in_time():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        output = started[0].communicate(timeout=60)[0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert output.splitlines()[0] == "met"
    assert "barrier 'save 7': waited 1 s as process 0 of 2; missing: process 1" in output
