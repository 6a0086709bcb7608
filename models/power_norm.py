"""Power normalisation: features scaled by what their squares have been over the batches seen so far."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from models.norms import unit_mean_square
from models.variables import Statistic, param
from partitioning import UserError


@jax.custom_vjp
def power_normalised(
    x: Float[Array, "*B D"],
    present: Bool[Array, "*B"],
    divisor: Float[Array, D],
    mean_square: Float[Array, D],
    product: Float[Array, D],
    updates: Float[Array, ""],
) -> Float[Array, "*B D"]:
    """z = x / divisor, with the gradient of the paper's backward pass.

    dx = (g - product z) / divisor, for the gradient g of z. The other cotangents are no derivatives but sums over the tokens
    that are present: of x^2 (`mean_square`), of z (g - product z) (`product`), and of 1 (`updates`).
    """
    return x / divisor


def _forward(x, present, divisor, mean_square, product, updates):
    return x / divisor, (x, present, divisor, product)


def _backward(kept, g):
    x, present, divisor, product = kept
    here = present[..., None].astype(x.dtype)
    z = x / divisor
    bounded = g - product * z * here
    over = tuple(range(x.ndim - 1))
    sums = ((x * x * here).sum(over), (z * bounded * here).sum(over), here.sum())
    return bounded / divisor, None, None, *sums


power_normalised.defvjp(_forward, _backward)


class PowerNorm(nnx.Module):
    """Scales each feature by the root of its running mean square over tokens; a token's own scale is divided out first.

    y = scale x / sqrt(phi) + bias,     x the input over the root mean square of its features,
    dx = (g - nu z) / sqrt(phi),        z = x / sqrt(phi), g the gradient of z,
    and after the step, the means over all tokens of the batch that are no padding:
    phi = a phi + (1 - a) mean(x^2),    a = min(decay, t / (t + 1)) at the t-th update, t from 0 on,
    nu = nu + (1 - decay) mean(z (g - nu z)).

    In the first `warm_up` updates phi is, for the tokens of a call that trains, the mean of their own squares: rows are then
    not independent, a token's state depends on those after it, and neither accumulation nor an objective that runs the
    model twice a step is exact; both are refused. Later, and whenever the model is used and not trained, each token is
    normalised for itself, by what earlier steps have seen.

    Args:
      width: D.
      eps: added to the mean squares.
      decay: how much of the running means stays at an update.
      warm_up: updates that take the batch's own mean square.
      axis: the logical name of the features.

    Raises:
      UserError: `decay` or `warm_up` is out of its range.

    Source: "PowerNorm: Rethinking Batch Normalization in Transformers", Shen et al., 2020; the division by a token's own
      scale, and the warm-up with its length, are the released code's.
    Differs: phi is the plain mean of the first batches until that is slower than `decay`. The released code divides in the
      backward pass by the batch's own root mean square, also after the warm-up, and averages nu over padding too; here it
      is the paper's running one, and padding never counts.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        decay: float = 0.9,
        warm_up: int = 10_000,
        axis: str = "embed",
    ):
        if not 0 <= decay < 1:
            raise UserError(f"PowerNorm.decay = {decay}: expected a number in [0, 1)")
        if warm_up < 0:
            raise UserError(f"PowerNorm.warm_up = {warm_up}: expected 0 or more updates")
        self.eps, self.decay, self.warm_up = eps, decay, warm_up
        # The name by which `nnx.Module.train` finds it.
        self.use_running_average = True
        self.scale = param(jnp.ones((width,)), (axis,))
        self.bias = param(jnp.zeros((width,)), (axis,))
        self.mean_square = Statistic(jnp.ones((width,)), axes=(axis,))
        self.product = Statistic(jnp.zeros((width,)), axes=(axis,))
        self.updates = Statistic(jnp.zeros(()), axes=())

    @property
    def couples_rows(self) -> str:
        """What would make rows independent, where they are not."""
        return "PowerNorm.warm_up = 0" if self.warm_up else ""

    def __call__(self, x: Float[Array, "*B D"], present: Bool[Array, "*B"] | None = None) -> Float[Array, "*B D"]:
        """Normalises the last dimension; tokens that are not present do not count."""
        wide = unit_mean_square(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.eps)
        statistics = [s.get_value().astype(wide.dtype) for s in (self.mean_square, self.product, self.updates)]
        kept, updates = jax.lax.stop_gradient((statistics[0], statistics[2]))
        if self.use_running_average:
            z = wide / jnp.sqrt(kept + self.eps)
        else:
            present = jnp.ones(x.shape[:-1], bool) if present is None else present
            if self.warm_up:
                here = present[..., None].astype(wide.dtype)
                over = tuple(range(x.ndim - 1))
                own = jax.lax.stop_gradient((wide * wide * here).sum(over) / jnp.maximum(here.sum(), 1))
                kept = jnp.where(updates < self.warm_up, own, kept)
            z = power_normalised(wide, present, jnp.sqrt(kept + self.eps), *statistics)
        return (z * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)

    def observe(self, sums: Mapping[str, Float[Array, ...]]) -> None:
        """Moves the running statistics by a step's sums, as in `power_normalised`; a stack's have its layers first."""
        count = sums["updates"]
        seen = count > 0
        mean = lambda name: sums[name] / jnp.maximum(count, 1)[..., None]
        done = self.updates.get_value()
        stays = jnp.minimum(self.decay, done / (done + 1))[..., None]
        square, product = self.mean_square.get_value(), self.product.get_value()
        new = {
            "mean_square": stays * square + (1 - stays) * mean("mean_square"),
            "product": product + (1 - self.decay) * mean("product"),
        }
        for name, value in new.items():
            old = getattr(self, name)
            old.set_value(jnp.where(seen[..., None], value, old.get_value()).astype(old.get_value().dtype))
        self.updates.set_value(jnp.where(seen, done + 1, done))
