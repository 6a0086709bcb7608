"""One host of a run whose rows lie on the devices of all hosts, cut along their length.

    python shared_rows.py HOST HOSTS PORT OUT

Eight devices in all, whatever the number of hosts.
"""

from __future__ import annotations

import sys

from host import TEXTS, join
from running import tiny

from data import Records
from objectives import MaskedLM
from partitioning import fsdp_sequence


def main(host: int, hosts: int, port: int, out: str) -> None:
    """Joins the others and trains."""
    join(host, hosts, port)
    tiny(
        data=Records(examples=[{"text": text} for text in TEXTS]),
        objective=MaskedLM(),
        rules=fsdp_sequence(8),
        steps=4,
        length=24,
    ).train(out)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]), sys.argv[4])
