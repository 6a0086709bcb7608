"""What one accelerator chip can do: the one table of figures from the makers' data sheets.

A program cannot run faster than these allow: FLOP/s bound its matrix products, memory its size, the bandwidths its traffic.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Pod:
    """How chips of one kind are sold together, and what one of them reads and sends.

    Args:
      name: as in a topology, such as v5p.
      shapes: chips by dimension of the torus, as slices of it are sold; smallest first.
      whole: the extent from which a dimension's ends are wired to each other, so that it is a ring and no line.
      hbm: bytes of a chip's memory.
      hbm_bandwidth: bytes a second between a chip and its memory.
      link: bytes a second of one link between neighbours, in one direction.
      dcn: bytes a second of a chip's share of the network between slices, in one direction.
    """

    name: str
    shapes: tuple[str, ...]
    whole: int
    hbm: int
    hbm_bandwidth: float
    link: float
    dcn: float


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator.

    Args:
      kind: a part of jax's `device_kind`, in lower case.
      flops: dense bfloat16 FLOP/s.
      pod: what is known of many of them; None where nothing is planned for them.
    """

    kind: str
    flops: float
    pod: Pod | None = None


_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Source: "TPU v5p", cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB at 2,765 GB/s, interconnect 1,200 GB/s a chip in both
# directions, which is six links of 100 GB/s each way; 50 Gbit/s a chip between slices. Cubes of 4x4x4 are closed to rings.
V5P = Pod(
    name="v5p",
    shapes=(
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        *("8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    ),
    whole=4,
    hbm=95 * GIB,
    hbm_bandwidth=2765e9,
    link=100e9,
    dcn=50e9 / 8,
)
# Source: "TPU v5e", cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, interconnect 400 GB/s a chip in both
# directions: four links of 50 GB/s; 6.4 Tbit/s between pods of 256. Only the whole pod of 16x16 is closed to rings.
V5E = Pod(
    name="v5e",
    shapes=_SQUARES,
    whole=16,
    hbm=16 * GIB,
    hbm_bandwidth=819e9,
    link=50e9,
    dcn=6.4e12 / 256 / 8,
)
# Source: "TPU v6e", cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1,600 GB/s, interconnect 800 GB/s a chip in both
# directions: four links of 100 GB/s; 25.6 Tbit/s between pods of 256.
V6E = Pod(
    name="v6e",
    shapes=_SQUARES,
    whole=16,
    hbm=32 * GIB,
    hbm_bandwidth=1600e9,
    link=100e9,
    dcn=25.6e12 / 256 / 8,
)

# The first whose kind is a part of a device's own counts. FLOP/s of the others are of their makers' data sheets too.
CHIPS = (
    Chip(kind="tpu v6", flops=918e12, pod=V6E),
    Chip(kind="tpu v5 lite", flops=197e12, pod=V5E),
    Chip(kind="tpu v5e", flops=197e12, pod=V5E),
    Chip(kind="tpu v5", flops=459e12, pod=V5P),
    Chip(kind="tpu v4", flops=275e12),
    Chip(kind="tpu v3", flops=123e12),
    Chip(kind="h200", flops=989e12),
    Chip(kind="h100 nvl", flops=835e12),
    Chip(kind="h100 pcie", flops=756e12),
    Chip(kind="h100", flops=989e12),
    Chip(kind="a100", flops=312e12),
)
PODS = {pod.name: pod for pod in (V5E, V6E, V5P)}


def chip_of(kind: str) -> Chip | None:
    """The chip of a `device_kind`, or None for one that the table does not have."""
    return next((chip for chip in CHIPS if chip.kind in kind.lower()), None)
