"""One host of two, the second of which says that it waits for data: prints what the hosts then know.

python slow_host.py HOST PORT OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from training.goodput import Goodput
from training.hosts import Hosts


def main(host: int, port: int, out: str) -> None:
    """Two rounds: what the first sent, the second reads."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, host)
    goodput = Goodput(lambda: 0.0)
    hosts = Hosts(Path(out), goodput)
    goodput.seconds |= {"data": 4.0 if host else 0.5, "step": 1.0, "device": 5.0 if host else 8.5}
    first = hosts.compare()
    goodput.seconds["data"] += 1
    sys.stdout.write(json.dumps([first, hosts.compare()]) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
