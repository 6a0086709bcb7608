"""`palmette plan`: what a run needs on chips that are not here, as tables, as JSON, and with advice where it does not fit."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitioning import topologies
from partitioning.errors import UserError
from partitioning.topologies import Topology

if TYPE_CHECKING:
    from training.forecast import Forecast

GIB = 2**30


@dataclass(frozen=True)
class Asked:
    """A configuration to plan.

    Args:
      paths, overrides, allow_import: as `launch.config.load` takes them.
      topology: where.
    """

    paths: Sequence[str]
    overrides: Sequence[str]
    topology: Topology
    allow_import: Sequence[str] = ()

    def plan(self) -> Any:
        """Resolves the configuration and plans it on the topology's devices.

        Raises:
          UserError: whatever does not fit together.
        """
        from launch.config import load

        devices = self.topology.devices()
        plans: list[Any] = []
        build: Callable[[Any], object] = lambda run: plans.append(run.plan(devices))
        load(self.paths, self.overrides, allow_import=self.allow_import, exercise=build)
        return plans[0]

    def forecasts(self) -> "list[Forecast]":
        """What each stage's step needs, compiled."""
        from training.forecast import forecast

        plan = self.plan()
        return [forecast(plan, stage, self.topology) for stage in plan.stages]


def asked(
    paths: Sequence[str], overrides: Sequence[str], topology: str, slices: int, allow_import: Sequence[str]
) -> Asked:
    """What a command line asks for.

    Raises:
      UserError: an unknown topology, or libtpu is not there.
    """
    # The machine's own devices take no part, and looking for a TPU takes seconds and many words.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    wanted = Asked(paths, overrides, topologies.topology(topology, slices), allow_import)
    wanted.topology.devices()
    return wanted


def planned(asked: Asked, *, out: Path | None) -> None:
    """Plans a run and prints what it needs.

    Args:
      asked: the configuration and where.
      out: a JSON file for the same figures, or None.

    Raises:
      UserError: a step that does not fit, with the largest term and with changes that do, each of them compiled.
    """
    from rich.console import Console

    # Tables as wide as they are: a file or a pipe has no width.
    say = lambda part: Console(width=160).print(part, highlight=False, markup=False)
    found = asked.forecasts()
    for one in found:
        for part in tables(one):
            say(part)
    _write(out, [as_json(one) for one in found])
    bad = next((one for one in found if not one.fits), None)
    if bad is None:
        return
    from launch.advice import advice

    short = f"{bad.topology}: a step needs {gib(bad.used)} a chip and there are {gib(bad.capacity)}"
    most = f"the largest term is {TERMS[bad.largest]} with {gib(bad.memory[bad.largest])}"
    fitting = [f"{change.words} ({gib(one.used)})" for change, one in advice(asked, say)]
    raise UserError(f"{short}; {most}; what fits: {', '.join(fitting) or 'none of the changes that were compiled'}")


def ranked(asked: Asked, *, most: int, out: Path | None) -> None:
    """Compiles several ways to run a configuration and prints them, fastest first.

    Args:
      asked, out: as in `planned`.
      most: how many are compiled.

    Raises:
      UserError: none fits.
    """
    from rich.console import Console

    from launch.advice import search

    say = lambda part: Console(width=160).print(part, highlight=False, markup=False)
    found = search(asked, most=most, say=say)
    best = table("least time of a step, fastest first", "change", "seconds", "binds", "MFU at most", "memory")
    for change, one in found:
        assert one.roofline is not None
        best.add_row(change.words, f"{one.roofline.step:.4g}", one.roofline.binds, f"{one.ceiling:.1%}", gib(one.used))
    say("")
    say(best)
    _write(out, [{"overrides": change.overrides} | as_json(one) for change, one in found])


def _write(out: Path | None, value: Any) -> None:
    if out is not None:
        out.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


TERMS = {
    "params": "parameters",
    "frozen": "frozen parameters",
    "buffers": "buffers",
    "optimizer": "optimizer",
    "average": "averages",
    "batch": "batch",
    "padding": "padding",
    "temporaries": "temporaries",
    "program": "program",
}


def gib(count: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def table(title: str, *heads: str) -> Any:
    """A plain rich table."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left", no_wrap=True)
    return made


def tables(one: "Forecast") -> list[Any]:
    """A forecast as rich tables and lines."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in one.mesh.items()) or "one chip"
    chips = one.topology.slices
    for extent in one.topology.extents:
        chips *= extent
    split = f" in {one.accumulate} parts" if one.accumulate > 1 else ""
    out: list[Any] = [
        f"steps {one.steps[0]}-{one.steps[1]} on {one.topology}: {chips} chips, mesh {mesh}; "
        f"{one.rows} rows of {one.length} tokens{split}",
        f"parameters: {', '.join(f'{tree} {count:,}' for tree, count in one.parameters.items())}",
        "",
    ]
    memory = table("memory of a chip", "", "bytes", "share")
    for term, count in one.memory.items():
        if count:
            memory.add_row(TERMS[term], gib(count), f"{count / one.capacity:.1%}")
    memory.add_row(
        "all of it" if one.fits else "all of it: DOES NOT FIT", gib(one.used), f"{one.used / one.capacity:.1%}"
    )
    work = table("work of a step, all chips", "", "FLOPs")
    work.add_row("model", f"{one.model_flops:.4g}")
    work.add_row("recomputed, optimizer", f"{one.beyond_flops:.4g}")
    work.add_row("masked halves", f"{one.masked_flops:.4g}")
    work.add_row("executed", f"{one.executed_flops:.4g}")
    out += [memory, "", work, one.formula, ""]
    if one.roofline is not None:
        if one.sent:
            sent = table("sent in a step, each chip", "collective", "axes", "over", "times", "bytes")
            for kind, axes, over, times, total in summed(one):
                sent.add_row(kind, axes, over, f"{times:,.0f}", gib(total))
            out += [sent, ""]
        least = table("least time of a step", "", "seconds")
        for name, alone in asdict(one.roofline).items():
            least.add_row(name, f"{alone:.4g}" + (" <- binds" if name == one.roofline.binds else ""))
        out += [least, f"MFU at most {one.ceiling:.1%}, were everything else hidden behind what binds"]
    if one.unbounded:
        out.append(f"loops of unknown length count once, so the figures are lower bounds: {', '.join(one.unbounded)}")
    return [*out, f"compiled in {one.compile_seconds:.1f} s"]


def summed(one: "Forecast") -> list[tuple[str, str, str, float, float]]:
    """Collectives by kind and axes: (kind, axes, network, times, bytes), largest first."""
    rows: dict[tuple[str, str, str], list[float]] = {}
    for each in one.sent:
        row = rows.setdefault((each.kind, " + ".join(each.axes), "DCN" if each.crosses else "ICI"), [0.0, 0.0])
        row[0] += each.count
        row[1] += each.bytes
    joined = [(*key, count, total) for key, (count, total) in rows.items()]
    return sorted(joined, key=lambda row: -row[-1])


def as_json(one: "Forecast") -> dict[str, Any]:
    """A forecast as plain values."""
    plain = asdict(one) | {"topology": str(one.topology), "used": one.used, "beyond_flops": one.beyond_flops}
    names = ("kind", "axes", "network", "times", "bytes")
    plain["sent"] = [dict(zip(names, row, strict=True)) for row in summed(one)]
    if one.roofline is not None:
        plain["roofline"] |= {"step": one.roofline.step, "binds": one.roofline.binds}
    return plain
