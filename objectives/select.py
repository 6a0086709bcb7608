"""Which tokens are hidden: a declared number of positions a row, with exact counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.positions import gather
from models.vocabulary import Vocabulary
from objectives.base import Schedule, at
from objectives.draws import Draws
from partitioning import UserError
from partitioning.ranges import Range, check_fields
from partitioning.spoiled import spoiled


class Selection(NamedTuple):
    """Chosen positions.

    positions: slots in the row, `[B, K]`, ascending where the weight is positive.
    weight: 1 for a chosen position, 0 for an unused place.
    """

    positions: Int[Array, "B K"]
    weight: Float[Array, "B K"]

    def gather(self, x: Array) -> Array:
        """Values of `[B, S, ...]` at the positions, `[B, K, ...]`."""
        return gather(x, self.positions)

    def scatter(self, x: Array, values: Array) -> Array:
        """`x` with `values` at the chosen positions."""
        rows = jnp.arange(x.shape[0])[:, None]
        # An unused place writes past the row, where the write is dropped.
        where = jnp.where(self.weight > 0, self.positions, x.shape[1])
        return x.at[rows, where].set(values, mode="drop")

    def hidden(self, length: int) -> Bool[Array, "B S"]:
        """Where a row is selected."""
        return self.scatter(jnp.zeros((self.positions.shape[0], length), bool), jnp.ones(self.positions.shape, bool))


@dataclass(frozen=True, kw_only=True)
class Select:
    """Base of all selections."""

    def __call__(self, batch: dict[str, Any], vocabulary: Vocabulary, *, step: Any, key: Draws) -> Selection:
        """Selects in every row of `batch["tokens"]`."""
        raise TypeError(f"{type(self).__name__} is a selection without a rule: define `__call__`")

    def fields(self) -> tuple[str, ...]:
        """Batch fields that it reads besides the text's."""
        return ()

    def check(self, steps: int) -> None:
        """Checks schedules over a stage's steps; raises UserError."""


@dataclass(frozen=True, kw_only=True)
class RatedSelect(Select):
    """Base of the selections that hide a share of a row's ordinary tokens.

    Args:
      rate: share of the tokens, a number or a schedule of the step.
      most: the largest rate that the schedule reaches, which fixes the number of places K = ceil(most * S); the rate
        itself where that is a number.

    Raises:
      UserError: a rate outside [0, 1], a schedule without `most`, or one that exceeds it.
    """

    rate: Annotated[float, Range(0, 1)] | Schedule = 0.15
    most: Annotated[float, Range(0, 1)] | None = None

    def __post_init__(self):
        check_fields(self)

    def check(self, steps: int) -> None:
        """Checks the schedule at every step."""
        if callable(self.rate):
            name = type(self).__name__
            if self.most is None:
                raise UserError(
                    f"{name}.most: required where the rate is a schedule, the largest rate it reaches, such as 0.3"
                )
            rates = jax.vmap(self.rate)(jnp.arange(steps))
            low, high = float(rates.min()), float(rates.max())
            # Schedules are float32.
            if low < 0 or high > self.most * (1 + 1e-6):
                raise UserError(
                    f"{name}.rate runs from {low:.4g} to {high:.4g}: it must stay in [0, most = {self.most:g}]"
                )

    def counts(
        self, batch: dict[str, Any], vocabulary: Vocabulary, step: Any
    ) -> tuple[Bool[Array, "B S"], Int[Array, B]]:
        """The tokens that may be hidden, and round(rate * n) of each row's n."""
        eligible = (batch["segments"] > 0) & ~vocabulary.is_special(batch["tokens"])
        return eligible, jnp.round(at(self.rate, step) * eligible.sum(1)).astype(jnp.int32)

    def places(self, length: int) -> int:
        """K, of rows of `length` tokens."""
        most = self.most if self.most is not None else float(self.rate)  # type: ignore[arg-type]
        return max(1, math.ceil(most * length))

    def selection(self, slots: Int[Array, "B N"], count: Int[Array, B], length: int) -> Selection:
        """The selection of some slots, K at most; what stands for none holds `length`."""
        places = self.places(length)
        slots = jnp.sort(slots, axis=1)[:, :places]
        used = slots < length
        # A count above the places cannot be dropped quietly: the loss becomes NaN and the guard names the step.
        weight = spoiled(used.astype(jnp.float32), count[:, None] > places)
        return Selection(jnp.where(used, slots, 0), weight)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(RatedSelect):
    """Exactly round(rate * n) of a row's n ordinary tokens, uniformly without replacement.

    Args:
      rate, most: as in `RatedSelect`.

    Source: "BERT", Devlin et al., 2019.
    Differs: the count is exact, not binomial.
    """

    def __call__(self, batch: dict[str, Any], vocabulary: Vocabulary, *, step: Any, key: Draws) -> Selection:
        """See `Select.__call__`."""
        eligible, count = self.counts(batch, vocabulary, step)
        length = eligible.shape[1]
        places = self.places(length)
        draw = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(key("select"))
        _, slots = jax.lax.top_k(jnp.where(eligible, draw, -1.0), places)
        return self.selection(jnp.where(jnp.arange(places) < count[:, None], slots, length), count, length)
