"""Rules from logical axis names to mesh axes, in two tables over one vocabulary."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partitioning.axes import AXES, MESH_AXES
from partitioning.errors import UserError
from partitioning.mesh import make_mesh

Names = tuple[str | None, ...]
Table = Mapping[str, tuple[str, ...]]
_SCOPE: contextvars.ContextVar["Placement | None"] = contextvars.ContextVar("placement", default=None)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Where each logical axis lives.

    Args:
      mesh: sizes by mesh axis, as `make_mesh` takes them.
      parameters: mesh axes by logical axis, for parameters, buffers and optimizer state. `()` says that the axis is
        deliberately not sharded; an axis that is absent is an error when an array has it.
      activations: the same for activations. `embed` may be sharded in one table and not in the other.

    Raises:
      UserError: a name outside the vocabulary, or a mesh axis that does not exist.
    """

    mesh: Mapping[str, int]
    parameters: Table
    activations: Table

    def __post_init__(self):
        for title, table in (("parameters", self.parameters), ("activations", self.activations)):
            for name, places in table.items():
                if name not in AXES:
                    raise UserError(f"rule {title}.{name}: no such logical axis: use one of {', '.join(AXES)}")
                for place in places:
                    if place not in MESH_AXES:
                        raise UserError(
                            f"rule {title}.{name} -> {place}: no such mesh axis: use one of {', '.join(MESH_AXES)}"
                        )

    def place(self, devices: Sequence[jax.Device] | None = None) -> "Placement":
        """These rules on a mesh of `devices` (all by default).

        Raises:
          UserError: what the mesh refuses, or an axis of it that no rule names: it would divide nothing.
        """
        mesh = make_mesh(self.mesh, devices)
        named = {
            place for chosen in (self.parameters, self.activations) for places in chosen.values() for place in places
        }
        for axis, size in mesh.shape.items():
            if size > 1 and axis not in named:
                raise UserError(
                    f"mesh axis {axis!r} of size {size} divides nothing: name it in a rule, such as activations batch or "
                    f"parameters mlp, or give its devices to another axis"
                )
        return Placement(self, mesh)


@dataclass(frozen=True)
class Placement:
    """Rules bound to a mesh: what the training path asks for every sharding."""

    rules: Rules
    mesh: Mesh

    def spec(
        self, names: Names, shape: tuple[int, ...], *, table: Literal["parameters", "activations"], what: str
    ) -> PartitionSpec:
        """The partition spec of one array, by its logical names.

        Args:
          names: a logical axis, or None for 'not sharded', for each dimension.
          shape: the array's shape.
          table: which table to read.
          what: the array's name, for messages.

        Raises:
          UserError: a dimension without a rule, two dimensions on one mesh axis, or a dimension that does not divide.
        """
        if len(names) != len(shape):
            raise UserError(
                f"{what} has shape {shape} and axis names {names}: give one name, or None, for each dimension"
            )
        chosen: Table = getattr(self.rules, table)
        entries: list[Any] = []
        taken: dict[str, str] = {}
        for name, size in zip(names, shape, strict=True):
            if name is None:
                entries.append(None)
                continue
            if name not in chosen:
                raise UserError(
                    f"{what}: no rule for the axis {name!r}: add it to rules.{table}, with () for 'not sharded'"
                )
            places = tuple(p for p in chosen[name] if self.mesh.shape[p] > 1)
            for place in places:
                if place in taken:
                    raise UserError(
                        f"{what}: axes {taken[place]!r} and {name!r} both go to mesh axis {place!r}: change one of the two rules"
                    )
                taken[place] = name
            ways = int(np.prod([self.mesh.shape[p] for p in places]))
            if size % ways:
                raise UserError(
                    f"{what}: axis {name!r} of size {size} does not divide over {' x '.join(places)} = {ways} devices: "
                    f"use a multiple of {ways}, or change the mesh or the rule"
                )
            entries.append(None if not places else places[0] if len(places) == 1 else places)
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def parameter(self, names: Names, shape: tuple[int, ...], what: str) -> NamedSharding:
        """The sharding of a parameter, buffer or optimizer moment."""
        return NamedSharding(self.mesh, self.spec(names, shape, table="parameters", what=what))

    def rows(self, shape: tuple[int, ...], what: str) -> NamedSharding:
        """The sharding of a batch field, whose first dimension is the row."""
        names = ("batch",) + (None,) * (len(shape) - 1)
        return NamedSharding(self.mesh, self.spec(names, shape, table="activations", what=what))

    @cached_property
    def share(self) -> tuple[int, int]:
        """Which share of a batch's rows this process reads, and how many shares there are.

        It is the number of processes, but where one row lies on devices of several: these read the same.

        Raises:
          UserError: processes that hold some rows in common and others not, or other numbers of rows.
        """
        cuts = self.rules.activations.get("batch", ())
        sizes = [self.mesh.shape[place] for place in cuts]
        held: dict[int, set[int]] = {}
        for index, device in np.ndenumerate(self.mesh.devices):
            at = [index[self.mesh.axis_names.index(place)] for place in cuts]
            block = int(np.ravel_multi_index(at, sizes)) if cuts else 0
            held.setdefault(device.process_index, set()).add(block)
        shares = sorted({tuple(sorted(blocks)) for blocks in held.values()})
        if len({len(blocks) for blocks in shares}) > 1 or len(shares) * len(shares[0]) != math.prod(sizes):
            raise UserError(
                f"on this mesh the hosts' devices share rows unevenly: choose sizes of tensor and sequence that divide, or "
                f"are multiples of, a host's {len(self.mesh.local_devices)} devices"
            )
        return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Makes `constrain` use this placement inside the block."""
        token = _SCOPE.set(self)
        try:
            yield
        finally:
            _SCOPE.reset(token)

    def explain(self, leaves: Mapping[str, tuple[tuple[int, ...], Any, Names]]) -> list[tuple[str, str, str, str, int]]:
        """What each leaf does on this mesh.

        Args:
          leaves: (shape, dtype, logical names) by leaf name.

        Returns:
          Rows of (leaf, shape, logical names, partition spec, bytes on each device).
        """
        rows = []
        for name, (shape, dtype, names) in leaves.items():
            sharding = self.parameter(names, shape, name)
            local = int(np.prod(sharding.shard_shape(shape))) * np.dtype(dtype).itemsize
            rows.append((name, str(tuple(shape)), str(names), str(sharding.spec), local))
        return rows


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Places an activation by the logical names of its dimensions.

    Outside a rule scope there is one device and nothing to place; with an ambient mesh and no scope a constraint would
    silently do nothing, and raises.

    Raises:
      UserError: a mesh is set and no rule scope is, or the names break a rule.
    """
    placement = _SCOPE.get()
    if placement is None:
        if not jax.sharding.get_abstract_mesh().empty:
            raise UserError("a mesh is set but no partition rules are: wrap the call in `with rules.place().scope():`")
        return x
    spec = placement.spec(names, x.shape, table="activations", what=f"activation {names}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(placement.mesh, spec))


def ways(name: str) -> int:
    """Over how many devices the rules in scope cut activations along a logical axis; 1 outside a scope."""
    placement = _SCOPE.get()
    if placement is None:
        return 1
    return math.prod(placement.mesh.shape[place] for place in placement.rules.activations.get(name, ()))


def is_cut(name: str) -> bool:
    """Whether the rules in scope cut activations along a logical axis over several devices."""
    return ways(name) > 1


def cuts(name: str) -> tuple[str, ...]:
    """The mesh axes over which the rules in scope cut activations along a logical axis: to talk along them inside
    `on_each_device`; none outside a scope."""
    placement = _SCOPE.get()
    if placement is None:
        return ()
    return tuple(p for p in placement.rules.activations.get(name, ()) if placement.mesh.shape[p] > 1)


@contextlib.contextmanager
def whole(name: str) -> Iterator[None]:
    """Inside the block activations are not cut along a logical axis: for a few tokens of each row, `length` is no length."""
    placement = _SCOPE.get()
    if placement is None or not is_cut(name):
        yield
        return
    rules = replace(placement.rules, activations={**placement.rules.activations, name: ()})
    with replace(placement, rules=rules).scope():
        yield


def on_each_device(
    function: Callable[..., Any],
    arrays: Sequence[tuple[jax.Array, Names]],
    results: Sequence[tuple[tuple[int, ...], Names]] | None = None,
) -> Any:
    """Calls a function with each device's part of the arrays, so that the compiler cuts nothing inside it: it cannot cut a
    kernel, and would cut a search into rounds that all send rows about.

    Args:
      function: of the arrays' parts.
      arrays: with the logical names of their dimensions.
      results: whole shapes and logical names of what the function returns; all are cut as the first array is by default.

    Raises:
      UserError: as `constrain`.
    """
    arrays = [(constrain(x, *names), names) for x, names in arrays]
    placement = _SCOPE.get()
    if placement is None:
        return function(*(x for x, _ in arrays))
    spec = lambda n, shape: placement.spec(n, shape, table="activations", what=f"array {n}")
    specs = tuple(spec(n, x.shape) for x, n in arrays)
    out = specs[0] if results is None else tuple(spec(n, shape) for shape, n in results)
    # What a kernel's result varies over is not known to the check.
    run = jax.shard_map(function, mesh=placement.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return run(*(x for x, _ in arrays))


def along(
    name: str,
    function: Callable[..., Any],
    arrays: Sequence[tuple[jax.Array, Names]],
    results: Sequence[tuple[tuple[int, ...], Names]],
) -> Any:
    """Calls a function with each device's part of the arrays, to talk along the mesh axes that cut a logical axis.

    Args:
      name: the logical axis; the rules in scope cut it.
      function: of these mesh axes and the arrays' parts.
      arrays: with the logical names of their dimensions.
      results: whole shapes and logical names of what the function returns. A result without the axis is the same on all
        devices along it.

    Raises:
      UserError: as `constrain`.
    """
    placement = _SCOPE.get()
    assert placement is not None
    places = cuts(name)
    spec = lambda n, shape: placement.spec(n, shape, table="activations", what=f"array {n}")
    run = jax.shard_map(
        lambda *parts: function(places, *parts),
        mesh=placement.mesh,
        in_specs=tuple(spec(n, x.shape) for x, n in arrays),
        out_specs=tuple(spec(n, shape) for shape, n in results),
        # What the states vary over, after they were gathered, is not known to the check.
        check_vma=False,
    )
    return run(*(x for x, _ in arrays))


def platform() -> str:
    """What the devices of the mesh in scope are, or jax's own where there is none: 'cpu', 'gpu', 'tpu'."""
    placement = _SCOPE.get()
    return jax.default_backend() if placement is None else placement.mesh.devices.flat[0].platform


def devices() -> int:
    """How many devices the mesh in scope has; 1 where there is none."""
    placement = _SCOPE.get()
    return 1 if placement is None else placement.mesh.size
