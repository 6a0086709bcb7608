"""A small house to configure: what the real packages offer, in the shapes that a configuration meets."""

import dataclasses
import os  # within reach of an attack by name
from collections.abc import Callable
from typing import Annotated, Any

from flax import nnx

from partitioning.errors import UserError
from partitioning.ranges import Range, check_fields

Schedule = Callable[[Any], Any]
HERE = os.sep


class Objective:
    """What a run learns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hide(Objective):
    """Hides a share of the tokens."""

    rate: Annotated[float, Range(0, 1)] | Schedule = 0.15
    span: Annotated[int, Range(1)] = 1
    kept: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair(Objective):
    """Two objectives by name."""

    parts: dict[str, Objective]
    shuffle: bool = False


class Mixer(nnx.Module):
    """A layer with one size."""

    def __init__(self, width: int = 8, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.width = width

    def __call__(self, x):
        return self.linear(x)


class Trunk(nnx.Module):
    """A stack of layers; its mixer is a class, called here."""

    def __init__(self, layers: int, mixer: Callable[..., Mixer] | None = None, dtype: Any = None, *, rngs: nnx.Rngs):
        if layers > 9:
            raise UserError(f"{layers} layers are too many")
        self.mixers = nnx.List([mixer(rngs=rngs) for _ in range(layers)] if mixer else [])
        self.layers = layers
        self.dtype = dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeper:
    """Keeps a constructor, and calls it long after it was itself built."""

    make: Callable[..., Trunk]

    def __call__(self, *, rngs):
        return self.make(rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Never built unless referenced."""

    decay: float = 0.0


def dropped(rate: float = 0.5, *, name: str = "drop", note: int = "none") -> tuple[float, str]:  # type: ignore
    """A function to configure, one of whose defaults breaks its own annotation."""
    return rate, name


def _own() -> None:
    """Nobody else's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parted(Objective):
    """An objective with a part of its own by default."""

    part: Hide = dataclasses.field(default_factory=Hide)
    names: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The top object."""

    steps: Annotated[int, Range(1)]
    objective: Objective
    model: Callable[..., Trunk] | None = None
    generator: Callable[..., Trunk] | None = None
    optimizer: Optimizer = Optimizer(decay=0.5)
    learning_rate: float | Schedule = 1e-3
    folder: str | None = None
    extra: Any = None
    kind: type[Objective] | None = None

    def abstract(self):
        """Build, by shape only, all that the run builds."""
        made = [m for m in (self.model, self.generator) if m is not None]
        return [nnx.eval_shape(lambda m=m: m(rngs=nnx.Rngs(0))) for m in made]
