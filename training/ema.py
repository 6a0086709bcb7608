"""A running mean of the parameters, often better than the last ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from partitioning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving average of parameters.

    mean <- mean + (1 - decay(step)) * (parameter - mean)

    The mean starts at the initial parameters and is kept in float32 whatever their type: the last factor would round
    away in a shorter one.

    Args:
      decay: a number in [0, 1), or an optax schedule of the optimizer step (a low decay at first forgets the start).

    Source: Acceleration of Stochastic Approximation by Averaging, Polyak and Juditsky, 1992.
    Differs: weights fall exponentially instead of being equal.

    Raises:
      UserError: a decay outside [0, 1).
    """

    decay: float | Callable[[Any], Any] = 0.999

    def __post_init__(self) -> None:
        if not callable(self.decay) and not 0 <= self.decay < 1:
            raise UserError(f"Ema.decay is {self.decay}: from 0 up to but not 1")

    def init(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The mean before the first step: copies, so that both trees may be donated."""
        return {name: jnp.array(value, dtype=jnp.float32, copy=True) for name, value in params.items()}

    def update(self, mean: Mapping[str, Array], params: Mapping[str, Array], step: Any) -> dict[str, Array]:
        """The mean after optimizer step `step` (counted from 0) made `params`."""
        decay = self.decay(step) if callable(self.decay) else self.decay
        rate = jnp.asarray(1 - decay, jnp.float32)
        return {name: mean[name] + rate * (value.astype(jnp.float32) - mean[name]) for name, value in params.items()}

    def read(self, mean: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
        """The mean in the types of the parameters, for evaluation and export."""
        return {name: mean[name].astype(value.dtype) for name, value in like.items()}
