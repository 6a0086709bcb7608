"""Rows that travel to the devices of their experts, and back, however many go to one: no row is lost.

Each device has rows of its own, sorted by expert, and a part of the experts. Every row goes to the device of its expert,
where rows lie by expert and then by the device that they came from. A device has room for all rows of all devices, for all
may come; of that room it uses what came. Every trip is a permutation, so that its transpose is the trip back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from partitioning import platform


class Slices(NamedTuple):
    """Rows between each pair of devices, by source, destination and expert.

    Args:
      sizes: how many.
      source: the first one's place at the source.
      destination: and at the destination.
      me: this device.
    """

    sizes: Int[Array, "P P L"]
    source: Int[Array, "P P L"]
    destination: Int[Array, "P P L"]
    me: Int[Array, ""]

    @property
    def arrived(self) -> Int[Array, L]:
        """Rows of each of this device's experts."""
        return self.sizes[:, self.me].sum(0)


def slices(chosen: Int[Array, M], experts: int, axes: tuple[str, ...]) -> Slices:
    """Who sends what where; devices tell each other how many rows they have for each expert.

    Args:
      chosen: the expert of each row.
      experts: how many there are on all devices.
      axes: mesh axes over which they are shared out.
    """
    counts = jax.lax.all_gather(jnp.bincount(chosen, length=experts).astype(jnp.int32), axes)
    devices = len(counts)
    sizes = counts.reshape(devices, devices, -1)
    # At the destination by expert and then by source.
    landed = _before(sizes.transpose(1, 2, 0).reshape(devices, -1)).reshape(devices, -1, devices).transpose(2, 0, 1)
    return Slices(sizes, _before(counts).reshape(sizes.shape), landed, jax.lax.axis_index(axes))


def there(x: Float[Array, "M ..."], table: Slices, axes: tuple[str, ...]) -> Float[Array, "R ..."]:
    """Rows, sorted by expert, at their experts' devices: as many as all devices have, those behind the last one zeros.

    Args:
      x: this device's rows.
      table: of all.
      axes: as in `slices`.
    """
    at = table.me
    leaves = table.sizes[at], table.source[at], table.destination[at]
    comes = table.sizes[:, at], table.destination[:, at]
    return _travel(x, len(x) * len(table.sizes), len(x), leaves, comes, axes)


def back(y: Float[Array, "R ..."], table: Slices, axes: tuple[str, ...]) -> Float[Array, "M ..."]:
    """Rows where they came from, in the order in which they left.

    Args:
      y: what `there` gave, or results for it.
      table, axes: as there.
    """
    at = table.me
    leaves = table.sizes[:, at], table.destination[:, at], table.source[:, at]
    comes = table.sizes[at], table.source[at]
    rows = len(y) // len(table.sizes)
    return _travel(y, rows, rows, leaves, comes, axes)


def _travel(x, room, most, leaves, comes, axes):
    """Sends slices of x: (sizes, where they begin, where they land) by device and expert; what comes is (sizes, where).

    A TPU sends what there is, by one ragged all-to-all. Elsewhere it is a plain one in which every pair of devices has room
    for `most` rows, which sends as many times more as there are devices.
    """
    if platform() == "tpu":
        sizes, begin, land = (part.reshape(-1) for part in leaves)
        out = jnp.zeros((room, *x.shape[1:]), x.dtype)
        return jax.lax.ragged_all_to_all(x, out, begin, sizes, land, comes[0].reshape(-1), axis_name=axes)
    places = lambda slices, none: jax.vmap(lambda sizes, begin: _places(sizes, begin, most, none))(*slices)
    packed = x.at[places(leaves[:2], len(x))].get(mode="fill", fill_value=0)
    got = jax.lax.all_to_all(packed, axes, 0, 0, tiled=True).reshape(-1, *x.shape[1:])
    where = places(comes, room).reshape(-1)
    origin = jnp.full((room,), len(got), jnp.int32).at[where].set(jnp.arange(len(got), dtype=jnp.int32), mode="drop")
    return got.at[origin].get(mode="fill", fill_value=0)


def _places(sizes: Int[Array, L], begin: Int[Array, L], most: int, none: int) -> Int[Array, M]:
    """Where rows lie that slices have side by side; `none` behind the last."""
    row = jnp.arange(most, dtype=sizes.dtype)
    ends = jnp.cumsum(sizes)
    of = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(sizes) - 1)
    return jnp.where(row < ends[-1], begin[of] + row - (ends - sizes)[of], none)


def _before(sizes: Int[Array, "P N"]) -> Int[Array, "P N"]:
    """How many lie before each, in its line."""
    return jnp.cumsum(sizes, -1) - sizes
