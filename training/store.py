"""A run's state in checkpoints: layers by index, frozen trees once, and the records beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import jax

from checkpoints.copied import Copied
from checkpoints.store import Checkpoints
from models.stack import layer_names
from partitioning import UserError
from training.plan import Plan
from training.state import State, by_group, by_index


class Store:
    """Saves and restores the state of one plan.

    Args:
      plan: of the run.
      folder: of the checkpoints.
      copy: folder of a copy of each; None for none.

    Raises:
      UserError: on restoring, what is there is of another model or other data, or nothing whole is there.
    """

    def __init__(self, plan: Plan, folder: str, copy: str | None = None):
        self.plan = plan
        run = plan.run
        first, *second = (
            Checkpoints(place, keep=run.keep, every=run.checkpoint_every, best=run.keep_best)
            for place in (folder, copy)
            if place is not None
        )
        self.checkpoints = Copied(first, second[0]) if second else first
        self.names = layer_names(plan.trees.shapes)
        # Through JSON, as the checkpoint has it.
        self.identity = json.loads(json.dumps([stage.reader.identity() for stage in plan.stages]))
        self.frozen: dict[str, Any] = {}
        self._by_index = jax.jit(lambda kept: by_index(kept, self.names))

    def trees(self, flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Leaves of a flat dict, by tree."""
        out: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            out.setdefault(name.split("/")[0], {})[name] = value
        return out

    def start(self, state: State) -> None:
        """Keeps the frozen trees of a new run, each once and by its hash."""
        for tree, flat in self.trees(state.frozen).items():
            self.frozen[tree] = self.checkpoints.save_frozen(tree, jax.jit(lambda f: by_index(f, self.names))(flat))

    def save(
        self, state: State, control: Mapping[str, Any], figures: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Writes a checkpoint in the background, with what it was judged by.

        Raises:
          UserError: it was judged, and not by the figure that `keep_best` names.
        """
        wanted = self.plan.run.keep_best
        if wanted is not None and figures and wanted[0] not in figures:
            raise UserError(f"Run.keep_best: no figure {wanted[0]!r}: use one of {', '.join(sorted(figures))}")
        packages = {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
        metadata = {"data": self.identity, "control": control, "frozen": self.frozen, "versions": packages}
        metadata |= {"figures": dict(figures)} if figures else {}
        self.checkpoints.save(int(state.step), self._by_index(state.kept()), metadata)

    def restore(self) -> tuple[State, dict[str, Any]]:
        """The newest complete checkpoint's state, on the plan's mesh, and its control log."""
        target = self.plan.targets()
        kept, saved = self.checkpoints.restore(by_index(target.kept(), self.names))
        self._check(saved)
        self.frozen = saved["frozen"]
        frozen = self._frozen(target)
        shardings = self.plan.shardings
        group = jax.jit(
            lambda tree, config: State(
                **by_group(tree, {**target.kept(), "frozen": target.frozen}, self.names), **config
            ),
            out_shardings=shardings,
        )
        return group({**kept, "frozen": frozen}, self.plan.configured()), saved["control"]

    def values(self) -> tuple[int, dict[str, Any]]:
        """The newest complete checkpoint's step, and its leaves without the optimizer's.

        Returns:
          The step, and leaves by name under `params` (the averaged ones where the run averages), `frozen` and `buffers`,
          on the plan's mesh.
        """
        target, average = self.plan.targets(), self.plan.run.average
        asked = {"step": target.step, "buffers": target.buffers}
        asked |= {"params": target.params} if average is None else {"average": target.average}
        kept, saved = self.checkpoints.restore_part(by_index(asked, self.names))
        self._check(saved)
        self.frozen = saved["frozen"]
        kept |= {"frozen": self._frozen(target)}
        grouped = by_group(kept, {**asked, "frozen": target.frozen}, self.names)
        if average is not None:
            grouped["params"] = average.read(grouped.pop("average"), target.params)
        shardings = {kind: getattr(self.plan.shardings, kind) for kind in ("params", "frozen", "buffers")}
        return int(grouped["step"]), jax.device_put({kind: grouped[kind] for kind in shardings}, shardings)

    def _check(self, saved: Mapping[str, Any]) -> None:
        if saved["data"] != self.identity:
            raise UserError(
                f"{self.checkpoints.folder}: trained on other data than this config reads "
                f"({_difference(saved['data'], self.identity)}): use another --out"
            )

    def _frozen(self, target: State) -> dict[str, Any]:
        """The frozen leaves, by index."""
        frozen: dict[str, Any] = {}
        for tree, flat in self.trees(target.frozen).items():
            if tree not in self.frozen:
                raise UserError(
                    f"{self.checkpoints.folder}: has no frozen tree {tree!r}: it is a run with another objective"
                )
            frozen |= self.checkpoints.load_frozen(self.frozen[tree], by_index(flat, self.names))
        return frozen


def _difference(old: Any, new: Any, where: str = "data") -> str:
    """The first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{where}.{key}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return _difference(a, b, f"{where}[{i}]")
    return f"{where}: {str(old)[:60]} there, {str(new)[:60]} here"
