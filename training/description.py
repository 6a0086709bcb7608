"""What a run would be, in lines: leaves, parameters, bytes, stages and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from training.plan import Plan


def described(plan: Plan) -> list[str]:
    """A plan in words; nothing is allocated.

    Returns:
      Lines: where every leaf lives, parameters and bytes of each tree, bytes of the whole state, the stages, and what the
      modules want a user to know.
    """
    placement, trees = plan.placement, plan.trees
    leaves = {name: (leaf.shape, leaf.dtype, trees.axes[name]) for name, leaf in trees.shapes.items()}
    explained = placement.explain(leaves)
    local = {name: size for name, *_, size in explained}
    sizes = {axis: size for axis, size in placement.mesh.shape.items() if size > 1}
    out = [
        f"mesh: {placement.mesh.size} device(s)"
        + (f", {', '.join(f'{a} {n}' for a, n in sizes.items())}" if sizes else ""),
        "",
    ]
    rows: list[tuple[str, ...]]
    rows = [(name, shape, names, spec, trees.kinds[name], size_of(b)) for name, shape, names, spec, b in explained]
    out += [*columns([("leaf", "shape", "axes", "partition", "kind", "a device"), *rows]), ""]

    rows = []
    for tree in dict.fromkeys(name.split("/")[0] for name in leaves):
        own = [name for name in leaves if name.split("/")[0] == tree]
        count = {kind: sum(_count(trees.shapes[n]) for n in own if trees.kinds[n] == kind) for kind in KINDS}
        whole = sum(_bytes(trees.shapes[name]) for name in own)
        rows.append(
            (tree, *(f"{count[kind]:,}" for kind in KINDS), size_of(whole), size_of(sum(local[name] for name in own)))
        )
    out += [*columns([("tree", "trained", "frozen", "buffers", "bytes", "a device"), *rows]), ""]

    whole = sum(_bytes(leaf) for leaf in jax.tree.leaves(plan.state))
    here = sum(
        int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(plan.state), jax.tree.leaves(plan.shardings), strict=True)
    )
    out += [f"state (parameters, optimizer, averages): {size_of(whole)}, {size_of(here)} on each device", ""]

    rows = []
    for stage in plan.stages:
        part = stage.stage
        tokens = part.steps * _tokens(stage.batch)
        batch = f"{part.batch_size}" + (f" in {part.accumulate} parts" if part.accumulate > 1 else "")
        name = type(part.objective).__name__
        rows.append((f"{stage.first}-{stage.last}", name, f"{part.length}", batch, f"{tokens:,}"))
    out += columns([("steps", "objective", "length", "batch", "tokens at most"), *rows])
    return [*out, *(["", *trees.warnings] if trees.warnings else [])]


KINDS = ("params", "frozen", "buffers")


def columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Rows of cells as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size_of(count: int) -> str:
    """Bytes in the largest unit that leaves a whole part."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _count(leaf: Any) -> int:
    return int(np.prod(leaf.shape))


def _bytes(leaf: Any) -> int:
    return _count(leaf) * leaf.dtype.itemsize


def _tokens(batch: Any) -> int:
    """Places for tokens in a batch."""
    return sum(_count(leaf) for name, leaf in batch.items() if name.split("/")[-1] == "tokens")
