"""What a compiled program sends between devices: kind, mesh axes, bytes and count of every collective."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from partitioning.chips import Pod
from partitioning.hlo import Computation, Instruction, Program, leaves, size
from partitioning.topologies import Topology

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

# Axes of a mesh, all of each: one in parts (`'x':(1)2`) is another notation.
_BY_AXES = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<extents>[\d,]+)\](?:T\((?P<turn>[\d,]+)\))?\))? \{(?P<over>[^:}]*)\}"
)


@dataclass(frozen=True)
class Collective:
    """One collective, summed over the times that it runs in a step.

    Args:
      kind: such as all-gather.
      axes: the mesh axes that its groups run along.
      bytes: of the array that it makes whole or takes whole, on each device: what an all-gather yields, and what an
        all-reduce, a reduce-scatter, an all-to-all or a permutation is given; of a ragged all-to-all the smaller of what it
        sends from and writes to; over all times.
      count: how often it runs.
      group: the devices of one group, as indices into the mesh's devices.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: float
    group: tuple[int, ...]

    @property
    def crosses(self) -> bool:
        """Whether it goes between slices, over the data centre's network."""
        return "slice" in self.axes


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """Every collective of a program, by kind, axes and group summed up; largest first.

    Args:
      program: compiled for the mesh.
      mesh: whose axes are named.
    """
    sums: dict[Any, float] = defaultdict(float)
    counts: dict[Any, float] = defaultdict(float)
    for name, times in program.runs.items():
        computation = program.computations[name]
        for instruction in computation:
            found = _collective(computation, instruction, mesh)
            if found is not None:
                kind, payload, group = found
                key = kind, _axes(group, mesh), group
                sums[key] += times * payload
                counts[key] += times
    out = [Collective(kind, axes, sums[key], counts[key], group) for key in sums for kind, axes, group in [key]]
    return sorted((one for one in out if one.axes), key=lambda one: -one.bytes)


def _collective(computation: Computation, one: Instruction, mesh: Mesh) -> tuple[str, float, tuple[int, ...]] | None:
    """Kind, bytes and one group of an instruction; None where it is no collective or another's echo."""
    if one.op == "send" and "_xla_megascale_transfer_type" in one.rest:
        # Between slices a TPU's program hands its array to a runtime that talks to the other slices.
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
        assert kind is not None
        axis = mesh.axis_names.index("slice")
        group = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), axis, 0).reshape(mesh.shape["slice"], -1)
        return kind[1].lower().replace("_", "-"), float(leaves(one.result)[0][0]), tuple(group[:, 0].tolist())
    kind_ = one.op.removesuffix("-start")
    if kind_ not in KINDS:
        return None
    if "chain_id=" in one.rest and not _starts(computation):
        # It runs on behind other work, whose fusions all show it; it began elsewhere.
        return None
    groups = _groups(one, mesh)
    given = sum(size(computation.instructions[name].result) for name in one.operands)
    if kind_ == "ragged-all-to-all":
        # Of its two buffers, what is sent from and what is written to, one may have room for the worst case: what crosses
        # fits in the smaller one. The sizes and places that come behind them cross too, and are a few numbers.
        given = min(size(computation.instructions[name].result) for name in one.operands[:2])
    if kind_ == "all-gather":
        return kind_, float(given * groups.shape[1]), tuple(groups[0].tolist())
    if kind_ == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
        # A reduction of which each device keeps its part, written as the one and then the other.
        kind_ = "reduce-scatter"
    return kind_, float(given), tuple(groups[0].tolist())


def _starts(computation: Computation) -> bool:
    return any('custom_call_target="AsyncCollectiveStart"' in one.rest for one in computation)


def groups(attributes: str, devices: int) -> Any:
    """The groups [G, N] that a collective joins, as the numbers that its program gives devices.

    Args:
      attributes: of the instruction, as written; groups may be lists, a numbered grid, or axes of a mesh.
      devices: how many the program counts; without groups all of them are one.

    Raises:
      ValueError: groups in a notation that is not known here.
    """
    numbers = lambda text: [int(n) for n in text.split(",")]

    def grid(extents, turn):
        order = np.arange(devices).reshape(extents)
        return order.transpose(numbers(turn)) if turn else order

    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        # Those whose ends differ say along which axes the arrays move.
        pairs = [numbers(pair) for pair in re.findall(r"\{?(\d+,\d+)\}?", found[1])]
        return np.asarray([pair for pair in pairs if pair[0] != pair[1]] or pairs[:1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return grid(numbers(found[2]), found[3]).reshape(numbers(found[1]))
    if found := _BY_AXES.search(attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found["sizes"])}
        over = re.findall(r"'(\w+)'", found["over"])
        order = grid(numbers(found["extents"]) if found["extents"] else [devices], found["turn"])
        order = order.reshape(list(sizes.values()))
        order = np.moveaxis(order, [list(sizes).index(name) for name in over], range(-len(over), 0))
        return order.reshape(-1, int(np.prod([sizes[name] for name in over])))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return np.asarray([numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])])
    if re.search(r"replica_groups=(?!\{\{?\}\}?)", attributes):
        raise ValueError(f"groups in a notation that is not known: {attributes[:200]}")
    return np.arange(devices)[None]


def _groups(one: Instruction, mesh: Mesh) -> Any:
    """Groups [G, N] of devices, as indices into the mesh's devices."""
    here = _here(mesh)
    return here[groups(one.rest, len(here))]


def _here(mesh: Mesh) -> Any:
    """The devices that a program's numbers count: of several slices each runs a program of its own, here the first's."""
    order = np.arange(mesh.size).reshape(mesh.devices.shape)
    return (
        np.take(order, 0, axis=mesh.axis_names.index("slice")).reshape(-1) if "slice" in mesh.shape else order.ravel()
    )


def _axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape), 1)
    return tuple(name for name, column in zip(mesh.axis_names, places.T, strict=True) if len(set(column.tolist())) > 1)


def seconds(one: Collective, mesh: Mesh, topology: Topology) -> float:
    """The least time that a collective's bytes take over the links of its group.

    A ring of n devices with both directions passes an array of b bytes around in b (n - 1) / n / (2 link); a line, whose
    ends are not wired, takes twice that. A group that spans several dimensions of the torus uses all their links at once.
    An all-reduce is two passes. An all-to-all of n sends b n / 4 through each cut of a line.
    """
    pod: Pod = topology.pod
    n = len(one.group)
    passes = {"all-reduce": 2.0}.get(one.kind, 1.0)
    if one.crosses:
        return passes * one.bytes * (n - 1) / n / pod.dcn
    devices = mesh.devices.ravel()
    spots = np.asarray([devices[i].coords for i in one.group])[:, : len(topology.extents)]
    spans = [len(set(column.tolist())) for column in spots.T]
    # A dimension is a ring where the group has all of it and its ends are wired.
    rings = [
        2 if span == whole and whole % pod.whole == 0 else 1
        for span, whole in zip(spans, topology.extents, strict=True)
    ]
    width = pod.link * sum(ring for span, ring in zip(spans, rings, strict=True) if span > 1)
    if not width:
        return 0.0
    if one.kind == "collective-permute":
        return one.bytes / pod.link
    if one.kind.endswith("all-to-all"):
        cuts = [span / 4 / (pod.link * ring) for span, ring in zip(spans, rings, strict=True) if span > 1]
        return one.bytes * max(cuts)
    return passes * one.bytes * (n - 1) / n / width
