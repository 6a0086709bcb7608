"""A run's modules as flat dicts of arrays, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from models.variables import Axes, Buffer, Flat, Statistic, axes_of, flatten, rebuild
from objectives.base import Companion, Models
from partitioning import Placement, UserError
from training.paths import found_by

Build = Callable[[jax.Array, Mapping[str, Flat]], dict[str, Companion]]


@dataclass(frozen=True, eq=False)
class Trees:
    """The static side of all modules of a run.

    Names are `<tree>/<path>`. The abstract build is the one source of shapes, names, shardings and restore targets.

    Args:
      build: makes every tree from a key and given values by tree and path; pure, and run under jit.
      graphs, abstract: graph definition and abstract state by tree.
      kinds: 'params', 'frozen' or 'buffers' by leaf name.
      axes: logical names by leaf name.
      shapes: abstract arrays by leaf name.
      init_from: the folder with initial values and what is not taken from it, of the trees that have one.
    """

    build: Build
    graphs: Mapping[str, nnx.GraphDef]
    abstract: Mapping[str, nnx.State]
    kinds: Mapping[str, str]
    axes: Axes
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    init_from: Mapping[str, tuple[str, tuple[str, ...]]]

    @classmethod
    def plan(cls, build: Build) -> Trees:
        """Builds the trees abstractly.

        Raises:
          UserError: a freeze rule that matches nothing, or a variable that is neither parameter nor buffer.
        """
        companions: dict[str, Companion] = {}

        def abstract() -> dict[str, nnx.Module]:
            companions.update(build(jax.random.key(0), {}))
            return {name: companion.module for name, companion in companions.items()}

        # Each tree is traced on its own: a joint split would give a shared variable to the first by name.
        modules = nnx.eval_shape(abstract)
        graphs, states, kinds, axes, shapes, sources = {}, {}, {}, {}, {}, {}
        for tree, module in modules.items():
            companion = companions[tree]
            if companion.init_from:
                sources[tree] = companion.init_from, companion.reinitialise
            elif companion.reinitialise:
                raise UserError(f"tree {tree!r} has reinitialise and no init_from: all of it is initialised anyway")
            graphs[tree], states[tree] = nnx.split(module)
            for kind in (nnx.Param, Buffer):
                leaves = flatten(module, kind)
                frozen = _frozen(tree, leaves, companion) if kind is nnx.Param else set()
                for path, names in axes_of(module, kind).items():
                    name = f"{tree}/{path}"
                    kinds[name] = "buffers" if kind is Buffer else "frozen" if path in frozen else "params"
                    axes[name], shapes[name] = names, leaves[path]
            extra = len(nnx.to_flat_state(states[tree])) - sum(name.startswith(f"{tree}/") for name in kinds)
            if extra:
                raise UserError(
                    f"tree {tree!r} holds {extra} variables that are neither nnx.Param nor Buffer: use one of the two"
                )
        return cls(build, graphs, states, kinds, axes, shapes, sources)

    def init(self, key: jax.Array, given: Mapping[str, Flat] = MappingProxyType({})) -> dict[str, Flat]:
        """The initial arrays by kind; meant for jit."""
        out: dict[str, Flat] = {"params": {}, "frozen": {}, "buffers": {}}
        for tree, companion in self.build(key, given).items():
            for kind in (nnx.Param, Buffer):
                for path, value in flatten(companion.module, kind).items():
                    out[self.kinds[f"{tree}/{path}"]][f"{tree}/{path}"] = value
        return out

    def models(self, params: Flat, frozen: Flat, buffers: Flat, *, training: bool = False) -> Models:
        """The modules around the given arrays; cheap, and done at tracing only.

        Args:
          params, frozen, buffers: by leaf name.
          training: whether the trees that have parameters among `params` see a batch to learn from it.
        """
        everything = params | frozen | buffers
        modules = {}
        for tree, graph in self.graphs.items():
            values = {name[len(tree) + 1 :]: v for name, v in everything.items() if name.startswith(f"{tree}/")}
            modules[tree] = rebuild(graph, self.abstract[tree], values)
            if training and tree in self.trained:
                modules[tree].train()
        return Models(modules)

    def observe(self, models: Models, sums: Flat) -> None:
        """Hands a step's sums, by leaf name, to the modules that keep statistics."""
        for tree in self.trained:
            for path, node in nnx.iter_graph(models.module(tree)):
                prefix = "/".join((tree, *map(str, path)))
                own = {name[len(prefix) + 1 :]: v for name, v in sums.items() if name.rpartition("/")[0] == prefix}
                if own:
                    node.observe(own)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The trees that have parameters to train."""
        return tuple(
            tree for tree in self.graphs if any(name.startswith(f"{tree}/") for name in self.of_kind("params"))
        )

    @cached_property
    def statistics(self) -> frozenset[str]:
        """The buffers of trained trees that move with what a step saw, by leaf name."""
        return frozenset(f"{tree}/{path}" for tree in self.trained for path in flatten(self._abstract(tree), Statistic))

    @cached_property
    def coupled(self) -> tuple[str, ...]:
        """How to make rows independent, for every module of a trained tree where they are not."""
        return self._said("couples_rows")

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What the modules of the trained trees want a user to know."""
        return self._said("warning")

    def _said(self, attribute: str) -> tuple[str, ...]:
        nodes = (node for tree in self.trained for _, node in nnx.iter_graph(self._abstract(tree)))
        return tuple(sorted({words for node in nodes if (words := getattr(node, attribute, ""))}))

    def _abstract(self, tree: str) -> nnx.Module:
        return nnx.merge(self.graphs[tree], self.abstract[tree])

    def buffers(self, models: Models) -> Flat:
        """The buffers that the modules hold now."""
        return {f"{tree}/{path}": v for tree in models for path, v in flatten(models.module(tree), Buffer).items()}

    def of_kind(self, kind: str) -> list[str]:
        """Leaf names of one kind."""
        return [name for name, k in self.kinds.items() if k == kind]

    def shardings(self, placement: Placement) -> dict[str, Any]:
        """Every leaf's sharding by name."""
        return {name: placement.parameter(self.axes[name], self.shapes[name].shape, name) for name in self.kinds}


def _frozen(tree: str, leaves: Flat, companion: Companion) -> set[str]:
    if not companion.train:
        return set(leaves)
    return found_by(companion.freeze, leaves, owner=f"freeze of tree {tree!r}")
