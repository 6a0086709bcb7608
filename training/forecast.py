"""What a stage's step will need and do on chips that are not here, read from the program that was compiled for them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from partitioning.collectives import Collective, collectives, seconds
from partitioning.hlo import parse
from partitioning.topologies import Topology
from partitioning.traffic import traffic
from training.flops import executed_flops, mfu_formula, peak_flops
from training.loop import step_flops
from training.plan import Plan, PlannedStage

HELD = ("params", "frozen", "buffers", "optimizer", "average")


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds of a step, by what takes them; each alone, with everything else for nothing.

    Args:
      compute: executed FLOPs over the chips' peak.
      hbm: bytes to and from a chip's memory over its bandwidth.
      ici: collectives inside a slice, one after the other.
      dcn: collectives between slices.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def step(self) -> float:
        """A step that overlaps all of them perfectly."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def binds(self) -> str:
        """What takes longest."""
        return max(asdict(self), key=asdict(self).__getitem__)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A stage's step on a topology.

    Args:
      topology, mesh: where; mesh sizes by axis, those of 1 left out.
      steps, rows, length, accumulate: of the stage.
      parameters: how many, by tree.
      memory: bytes on each chip: the state by part, the batch, temporaries, the program.
      capacity: bytes of a chip's memory.
      fits: whether the compiler found room.
      model_flops: a step's, by the formula.
      formula: that formula, with numbers.
      executed_flops: with what is recomputed, with masked halves and with the optimizer's own products.
      masked_flops: of these, the masked halves of causal attention.
      compile_seconds: tracing, lowering and compiling.
      sent: the collectives; empty where the program does not fit.
      roofline: the least time; None where it does not fit.
      hbm_bytes: moved to and from a chip's memory in a step, an estimate.
      ceiling: the largest MFU that the roofline allows.
      unbounded: loops whose trips are not known and count once, so that what they do is a lower bound.
    """

    topology: Topology
    mesh: dict[str, int]
    steps: tuple[int, int]
    rows: int
    length: int
    accumulate: int
    parameters: dict[str, int]
    memory: dict[str, int]
    capacity: int
    fits: bool
    model_flops: float
    formula: str
    executed_flops: float
    masked_flops: float
    compile_seconds: float
    sent: list[Collective] = field(default_factory=list)
    roofline: Roofline | None = None
    hbm_bytes: float = 0.0
    ceiling: float = 0.0
    unbounded: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Bytes in use on each chip."""
        return sum(self.memory.values())

    @property
    def largest(self) -> str:
        """The term of memory that takes most."""
        return max(self.memory, key=self.memory.__getitem__)

    @property
    def beyond_flops(self) -> float:
        """Executed FLOPs that the formula does not have and no mask hides: recomputed ones and the optimizer's."""
        return self.executed_flops - self.masked_flops - self.model_flops


def forecast(plan: Plan, stage: PlannedStage, topology: Topology) -> Forecast:
    """Compiles a stage's step for a topology and reads what it needs.

    Args:
      plan: on the topology's devices.
      stage: of the plan.
      topology: whose chips they are.
    """
    mesh = plan.placement.mesh
    begin = time.perf_counter()
    program, needed = None, 0
    try:
        program = plan.compile(stage)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = asked(str(error))
    compile_seconds = time.perf_counter() - begin

    memory = {part: held(getattr(plan.state, part), getattr(plan.shardings, part)) for part in HELD}
    memory["batch"] = sum(local(leaf) * leaf.dtype.itemsize for leaf in stage.batch.values())
    arguments = sum(memory.values())
    with plan.placement.scope():
        model = step_flops(plan, stage)
        whole = executed_flops(stage.step, plan.state, stage.batch)
        unmasked = executed_flops(stage.step, plan.state, stage.batch, masked=False)
    peak = peak_flops(mesh.devices.flat[0])
    common: dict[str, Any] = {
        "topology": topology,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "steps": (stage.first, stage.last),
        "rows": stage.stage.batch_size,
        "length": stage.stage.length,
        "accumulate": stage.stage.accumulate,
        "parameters": counted(plan),
        "capacity": topology.pod.hbm,
        "model_flops": model.flops,
        "formula": mfu_formula(model, "seconds of a step", devices=mesh.size, peak=peak),
        "executed_flops": whole.flops,
        "masked_flops": whole.flops - unmasked.flops,
        "compile_seconds": compile_seconds,
    }
    if program is None:
        memory["temporaries"] = max(0, needed - arguments)
        return Forecast(memory=memory, fits=False, **common)
    found = program.memory_analysis()
    memory["padding"] = max(0, found.argument_size_in_bytes - arguments)
    memory["temporaries"] = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    memory["program"] = found.generated_code_size_in_bytes
    parsed = parse(program.as_text())
    sent = collectives(parsed, mesh)
    moved = traffic(parsed)
    lasts = lambda crosses: sum(seconds(one, mesh, topology) for one in sent if one.crosses == crosses)
    roofline = Roofline(
        compute=whole.flops / mesh.size / peak.flops,
        hbm=moved / topology.pod.hbm_bandwidth,
        ici=lasts(False),
        dcn=lasts(True),
    )
    return Forecast(
        memory=memory,
        fits=True,
        sent=sent,
        roofline=roofline,
        hbm_bytes=moved,
        ceiling=model.flops / (mesh.size * peak.flops * roofline.step),
        unbounded=tuple(parsed.unbounded),
        **common,
    )


def counted(plan: Plan) -> dict[str, int]:
    """Parameters by tree, frozen ones included."""
    out: dict[str, int] = {}
    for name, leaf in plan.trees.shapes.items():
        if plan.trees.kinds[name] in ("params", "frozen"):
            tree = name.split("/")[0]
            out[tree] = out.get(tree, 0) + int(np.prod(leaf.shape))
    return out


def held(tree: Any, shardings: Any) -> int:
    """Bytes of a part of the state on each device."""
    places = jax.tree.leaves(shardings)
    return sum(
        int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), places, strict=True)
    )


def local(leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of a placed array on each device."""
    assert leaf.sharding is not None
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape)))


UNITS: Mapping[str, int] = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def asked(message: str) -> int:
    """Bytes that a program asked for, out of the compiler's refusal."""
    patterns = (r"Used ([\d.]+)([KMGT]?) of", r"(?:memory|requirement)[^(]*\(([\d.]+)([KMGT]?)\)")
    for pattern in patterns:
        found = re.search(pattern, message)
        if found:
            return int(float(found[1]) * UNITS[found[2]])
    return 0
