"""Chips that are not here: the devices of a TPU slice to compile for, on any machine with libtpu."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from partitioning.chips import PODS, Pod
from partitioning.errors import UserError

# Without these libtpu asks a cloud machine's metadata who it is, says at length that none answers, and lets one process on
# a machine compile at a time.
HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """A slice of a pod, or several.

    Args:
      pod: of which chips.
      shape: chips by dimension, such as 8x8x8.
      slices: how many such slices work together over the data centre's network.
    """

    pod: Pod
    shape: str
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.pod.name}:{self.shape}" + (f" x {self.slices} slices" if self.slices > 1 else "")

    @property
    def extents(self) -> tuple[int, ...]:
        """Chips by dimension of one slice."""
        return tuple(int(n) for n in self.shape.split("x"))

    @property
    def larger(self) -> tuple["Topology", ...]:
        """The larger slices of the same chips, smallest first."""
        shapes = self.pod.shapes
        return tuple(Topology(self.pod, shape, self.slices) for shape in shapes[shapes.index(self.shape) + 1 :])

    def devices(self) -> list[Any]:
        """The chips, as devices that programs can be compiled for and that hold nothing.

        Raises:
          UserError: libtpu is not installed.
        """
        if find_spec("libtpu") is None:
            raise UserError("libtpu, which compiles for TPUs, is not installed: pip install 'palmette[tpu]'")
        for name, value in HERE.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        several = {"num_slices": self.slices} if self.slices > 1 else {}
        name = f"{self.pod.name}:{self.shape}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)


def topology(text: str, slices: int = 1) -> Topology:
    """Reads a topology such as `v5p:8x8x8`.

    Raises:
      UserError: one that nobody sells; lists those that are.
    """
    name, _, shape = text.partition(":")
    pod = PODS.get(name)
    if pod is None or shape not in pod.shapes:
        known = "; ".join(f"{pod.name}: {', '.join(pod.shapes)}" for pod in PODS.values())
        raise UserError(
            f"topology {text!r} is unknown: use a chip and a shape of its slices, such as v5p:8x8x8 ({known})"
        )
    return Topology(pod, shape, slices)
