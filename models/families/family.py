"""Which family a trunk is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flax import nnx

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class Family:
    """A family's name and the sizes that its function was called with."""

    name: str
    sizes: tuple[tuple[str, Any], ...]

    def __getitem__(self, size: str) -> Any:
        return dict(self.sizes)[size]


def named(model: Model, name: str, sizes: Mapping[str, Any]) -> Model:
    """The model, knowing its family."""
    model.family = nnx.static(Family(name, tuple(sorted(sizes.items()))))
    return model
