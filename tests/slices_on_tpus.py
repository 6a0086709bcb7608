"""Compiles a tiny step for two slices of four TPU chips that are not here, by libtpu's compiler.

A process of its own: libtpu refuses XLA's flags for CPUs. Prints what kinds of transfers cross the slices, each once. The
program is one slice's: collectives are within it, and what crosses goes through the hosts.
"""

import json
import re
import sys

from jax.experimental import topologies
from running import tiny

from partitioning import fsdp


def kinds() -> list[str]:
    """Of the optimised program."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    plan = tiny("clm", rules=fsdp(slices=2)).plan(chips)
    text = plan.compile(plan.stages[0]).as_text()
    return sorted(set(re.findall(r'_xla_megascale_transfer_type="(\w+)"', text)))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(kinds()))
