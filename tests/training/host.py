"""One host of a run of several: trains a tiny text run into a folder.

    python host.py HOST HOSTS PORT OUT

Eight devices in all, whatever the number of hosts.
"""

from __future__ import annotations

import sys

import jax
from awkward import EXPERTS
from running import tiny

from data import Records
from objectives import MaskedLM
from partitioning import fsdp_tensor
from training.ema import Ema

TEXTS = [f"{i} quick brown foxes jump over {i * i} lazy dogs"[: 8 + i % 30] for i in range(60)]


def join(host: int, hosts: int, port: int) -> None:
    """Joins the others, with a share of eight devices; what is imported above touches none."""
    jax.config.update("jax_num_cpu_devices", 8 // hosts)
    if hosts > 1:
        jax.distributed.initialize(f"localhost:{port}", hosts, host)


def main(host: int, hosts: int, port: int, out: str) -> None:
    """Joins the others and trains."""
    join(host, hosts, port)
    tiny(
        model=EXPERTS,
        data=Records(examples=[{"text": text} for text in TEXTS]),
        objective=MaskedLM(),
        rules=fsdp_tensor(2),
        steps=6,
        batch_size=16,
        length=24,
        accumulate=2,
        average=Ema(decay=0.9),
    ).train(out)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]), sys.argv[4])
