"""Initial values of a tree: another run's trunk, or a model in the Hugging Face layout, whole or in part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from checkpoints.folder import checkpoints_in, place
from checkpoints.store import Checkpoints
from models.hub.folder import CONFIG, Folder
from models.stack import layer_names
from models.variables import Flat
from partitioning import Placement, UserError
from training.paths import found_by
from training.state import by_group, by_index, entry
from training.trees import Trees

REPORT = "init_from.json"
NAMED = 4
"""Names in a line of the report; all are in the file."""


@dataclass(frozen=True)
class Initial:
    """What a tree begins with; parameters and buffers are named by path, layers by index.

    Args:
      values: arrays by path, in the tree's grouping and shardings.
      source: the folder.
      used: what the folder gave.
      spread: those of them that a dense layer gave to every expert.
      reinitialised: what begins as in a run without the folder: by name, and buffers that are not there.
      left: what the folder has and the tree has no place for, by its names there.
    """

    values: Flat = field(repr=False)
    source: str
    used: list[str]
    spread: list[str]
    reinitialised: list[str]
    left: list[str]

    def line(self, tree: str) -> str:
        """The report of a tree in one line."""
        parts = [f"{len(self.used)} arrays used"]
        kinds = (
            ("given to every expert", self.spread),
            ("re-initialised", self.reinitialised),
            ("left there", self.left),
        )
        for kind, names in kinds:
            if names:
                more = ", ..." if len(names) > NAMED else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:NAMED])}{more}")
        return f"{tree} from {self.source}: {'; '.join(parts)}"


def keep_report(out: Path, initial: Mapping[str, Initial], say: Callable[[str], None]) -> None:
    """Says what each tree began with, and writes `init_from.json` into a run's folder."""
    for tree, found in initial.items():
        say(found.line(tree))
    if initial and not jax.process_index():
        record = {tree: {k: v for k, v in asdict(found).items() if k != "values"} for tree, found in initial.items()}
        out.mkdir(parents=True, exist_ok=True)
        aside = out / f".{REPORT}.{os.getpid()}"
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.replace(out / REPORT)


def initial_values(trees: Trees, placement: Placement, tree: str, seeded: Callable[[], Flat]) -> Initial:
    """The parameters and buffers that a tree's `init_from` has for it; those that `reinitialise` matches are the run's own.

    Buffers are part of the function: routers' biases, tables of hashes, a norm's running statistics. One that a run's folder
    does not have begins as usual. Matrices of experts that are one matrix there, a dense layer's, take that one for every
    expert.

    Args:
      trees: of the run.
      placement: its mesh and rules.
      tree: which one.
      seeded: the values of a run without `init_from`, by leaf name.

    Raises:
      UserError: the folder is neither a run's nor one with `config.json` and safetensors; a parameter that is not to be
        re-initialised is not there, or of another shape; a pattern matches nothing; a file is broken.
    """
    folder, patterns = trees.init_from[tree]
    names, shardings = layer_names(trees.shapes), trees.shardings(placement)
    mine = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name])
        for name, shape in trees.shapes.items()
        if name.startswith(f"{tree}/")
    }
    short = lambda flat: {name.removeprefix(f"{tree}/"): leaf for name, leaf in flat.items()}
    leaves = short(by_index(mine, names))
    buffers = {n.removeprefix(f"{tree}/") for name in mine if trees.kinds[name] == "buffers" for n in names[name]}
    anew = found_by(patterns, leaves, owner=f"reinitialise of tree {tree!r}")
    wanted = {name: leaf for name, leaf in leaves.items() if name not in anew}
    spread: list[str] = []
    if (place(folder) / CONFIG).is_file():
        found, left = _from_hub(nnx.merge(trees.graphs[tree], trees.abstract[tree]), folder, leaves, wanted)
    else:
        sparse = [name for name in mine if "expert" in trees.axes[name]]
        many = wanted.keys() & {n.removeprefix(f"{tree}/") for name in sparse for n in names[name]}
        found, spread, left = _from_run(folder, leaves, wanted, many, buffers, placement)
        anew |= wanted.keys() - found.keys()
    if anew:
        own = short(by_index({name: leaf for name, leaf in seeded().items() if name in mine}, names))
        found = found | {name: own[name] for name in anew}
    values = by_group({f"{tree}/{name}": value for name, value in found.items()}, mine, names)
    return Initial(short(values), folder, sorted(leaves.keys() - anew), spread, sorted(anew), left)


def _from_run(
    folder: str, leaves: Flat, wanted: Flat, sparse: Set[str], buffers: Set[str], placement: Placement
) -> tuple[Flat, list[str], list[str]]:
    """What a run's trunk had, from its newest checkpoint and, where it was frozen there, from its frozen tree.

    Parameters that are `sparse`, with experts first, may be there without them; which are so is the second result. `buffers`
    need not be there.
    """
    store = Checkpoints(checkpoints_in(folder))
    if not store.steps():
        raise UserError(
            f"init_from: {folder} has neither checkpoints nor {CONFIG}: expected the folder of a run, or of a model in "
            "the Hugging Face layout"
        )
    table, metadata = store.newest()
    frozen = "trunk/"
    there: dict[str, dict[str, tuple[int, ...]]] = {"params": {}, "buffers": {}}
    for kind, known in there.items():
        begin = f"{kind}/trunk/"
        known |= {n.removeprefix(begin): tuple(e["shape"]) for n, e in table.items() if n.startswith(begin)}
    reference = metadata.get("frozen", {}).get("trunk")
    kept = store.frozen_leaves(reference) if reference else {}
    shapes = there["params"] | there["buffers"] | {name.removeprefix(frozen): leaf.shape for name, leaf in kept.items()}
    spread = sorted(name for name in sparse if shapes.get(name) == wanted[name].shape[1:])
    whole, wanted = wanted, wanted | {name: entry(wanted[name], 0) for name in spread}
    wanted = {name: leaf for name, leaf in wanted.items() if name in shapes or name not in buffers}
    _check(folder, wanted, shapes)
    parts = {
        kind: {f"trunk/{name}": leaf for name, leaf in wanted.items() if name in known} for kind, known in there.items()
    }
    asked = {kind: part for kind, part in parts.items() if part}
    restored = store.restore_part(asked)[0] if asked else {}
    found: Flat = {name: value for part in restored.values() for name, value in part.items()}
    if reference and any(frozen + name in kept for name in wanted):
        # Its hash is of the whole tree, so that is read: on every device what has no place here.
        everywhere = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.replicated)
        every = {name: wanted.get(name.removeprefix(frozen), everywhere(leaf)) for name, leaf in kept.items()}
        found = found | store.load_frozen(reference, every)
    found = {name.removeprefix("trunk/"): value for name, value in found.items()}
    found |= {name: _for_all(found[name], whole[name]) for name in spread}
    return {name: found[name] for name in wanted}, spread, sorted(shapes.keys() - leaves.keys())


def _for_all(value: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """The same for every expert."""
    return jax.jit(lambda x: jnp.broadcast_to(x, leaf.shape), out_shardings=leaf.sharding)(value)


def _check(folder: str, wanted: Flat, there: Mapping[str, Sequence[int]]) -> None:
    """Refuses parameters that cannot come from where they should."""
    lacking = [name for name, leaf in wanted.items() if there.get(name) != leaf.shape]
    if lacking:
        name = lacking[0]
        what = f"{there[name]} there and {wanted[name].shape} here" if name in there else "not there"
        raise UserError(
            f"init_from: {folder} lacks {len(lacking)} of {len(wanted)} parameters, first {name!r} ({what}): what is to "
            "begin anew is named by reinitialise"
        )


def _from_hub(trunk: Any, folder: str, leaves: Flat, wanted: Flat) -> tuple[Flat, list[str]]:
    found, left = Folder.open(folder).load(trunk, {name: leaf.shape for name, leaf in leaves.items()}, wanted)
    # Every host reads the files; each device takes its part.
    place = lambda leaf, value: jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda part: value[part].astype(leaf.dtype)
    )
    return {name: place(leaf, found[name]) for name, leaf in wanted.items()}, left
