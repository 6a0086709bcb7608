"""A guard that skips steps whose gradient cannot be meant, and ends a run that has nothing else."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from partitioning.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Accepts a step if its loss and gradient norm are finite and the norm does not spike.

    ok = isfinite(loss) and isfinite(g) and g <= spike * mean,  mean = running mean of accepted norms g.

    Args:
      spike: largest accepted ratio of the gradient's norm to the running mean; None checks for finite numbers only.
      decay: of the running mean, for one accepted step; bias-corrected.
      warmup: accepted steps before the mean is trusted to call a spike.
      patience: skipped steps in a row that end the run.

    Raises:
      UserError: a value out of range.
    """

    spike: float | None = None
    decay: float = 0.99
    warmup: int = 20
    patience: int = 20

    def __post_init__(self) -> None:
        if self.spike is not None and self.spike <= 1:
            raise UserError(f"Guard.spike is {self.spike}: a ratio to the mean norm, greater than 1")
        if not 0 <= self.decay < 1:
            raise UserError(f"Guard.decay is {self.decay}: from 0 up to but not 1")
        if self.patience < 1 or self.warmup < 1:
            raise UserError(f"Guard.patience ({self.patience}) and Guard.warmup ({self.warmup}) are 1 or more")

    def init(self) -> dict[str, Array]:
        """The state before the first step: sums of the mean, accepted steps, skipped steps in a row and in all."""
        # One array each: a donated state may not hold the same buffer twice.
        return {
            "sum": jnp.zeros((), jnp.float32),
            "accepted": jnp.zeros((), jnp.int32),
            "run": jnp.zeros((), jnp.int32),
            "skipped": jnp.zeros((), jnp.int32),
        }

    def __call__(
        self, state: dict[str, Array], loss: Float[Array, ""], gradient_norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], dict[str, Array]]:
        """Whether to accept the step, and the state after it. Pure: for the inside of a jitted step."""
        norm = gradient_norm.astype(jnp.float32)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.spike is not None:
            weight = 1 - self.decay ** state["accepted"].astype(jnp.float32)
            mean = state["sum"] / jnp.where(weight > 0, weight, 1.0)
            ok &= (state["accepted"] < self.warmup) | (norm <= self.spike * mean)
        # Not a product with ok: 0 * nan is nan.
        total = jnp.where(ok, self.decay * state["sum"] + (1 - self.decay) * norm, state["sum"])
        taken = ok.astype(jnp.int32)
        return ok, {
            "sum": total,
            "accepted": state["accepted"] + taken,
            "run": (state["run"] + 1) * (1 - taken),
            "skipped": state["skipped"] + 1 - taken,
        }

    def check(self, state: dict[str, Any], *, step: int) -> None:
        """Ends the run after `patience` skipped steps in a row. On the host; waits for the state.

        Raises:
          UserError: says what was seen and what to change.
        """
        run = int(state["run"])
        if run >= self.patience:
            raise UserError(
                f"step {step}: the last {run} steps were skipped, their loss or gradient not finite or spiking "
                f"(Guard.patience = {self.patience}): lower the learning rate, clip, or look with --debug"
            )


def chosen(ok: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` where the step is accepted and `old` where it is skipped, for every leaf of two like trees."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
