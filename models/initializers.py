"""Initial weights."""

import re
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Model = TypeVar("Model", bound=nnx.Module)
DEVIATION = 0.02


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = DEVIATION) -> Float[Array, "*shape"]:
    """Normal draws with standard deviation `scale`, cut at three of them."""
    return scale * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape, jnp.float32)


def deviating(model: Model, deviations: Mapping[str, float]) -> Model:
    """The same new model, some of its drawn weights wider or narrower.

    Args:
      model: just built, its weights drawn by `normal`.
      deviations: standard deviations by regular expressions over the ends of paths; the first that matches counts.
    """
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = "/".join(map(str, path))
        wanted = next((d for pattern, d in deviations.items() if re.search(f"(?:{pattern})$", name)), DEVIATION)
        leaf.set_value(leaf.get_value() * (wanted / DEVIATION))
    return model
