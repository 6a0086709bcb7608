"""Randomness that neither sharding nor micro-batching changes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draws:
    """The source of every draw in a step.

    A draw that belongs to a row uses `fold_in(seed, step, row, name)`, one that belongs to the batch
    `fold_in(seed, step, name)`.

    Args:
      step_key: `fold_in(seed, step)`.
      rows: global row numbers, `[B]`; a micro-batch holds some of them.
      total: rows in the step's whole batch.
    """

    step_key: jax.Array
    rows: Int[Array, B]
    total: int = field(metadata={"static": True})

    def __call__(self, name: str) -> jax.Array:
        """One key a row, `[B]`."""
        return jax.vmap(lambda row: jax.random.fold_in(self.batch(name), row))(self.rows)

    def batch(self, name: str) -> jax.Array:
        """One key for the whole batch, the same in every micro-batch."""
        # crc32 is the same in every process, which hash() of a string is not.
        return jax.random.fold_in(self.step_key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def spread(self, count: int) -> Draws:
        """Draws for `count` sub-rows of every row, row-major: candidates of a list, samples of a prompt."""
        rows = self.rows[:, None] * count + jnp.arange(count, dtype=self.rows.dtype)
        return Draws(self.step_key, rows.reshape(-1), self.total * count)

    def chunk(self, rows: Int[Array, b]) -> Draws:
        """The draws of some of the rows."""
        return Draws(self.step_key, rows, self.total)


def draws(seed_key: jax.Array, step: Int[Array, ""] | int, rows: Int[Array, B], total: int) -> Draws:
    """The draws of one step."""
    return Draws(jax.random.fold_in(seed_key, step), rows, total)
