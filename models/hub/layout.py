"""What a layout says: which of its tensors is which of our leaves, and how each becomes the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.families.family import Family


@dataclass(frozen=True)
class Tensor:
    """One tensor of another layout.

    Args:
      name: theirs.
      leaves: ours, layers by index, that it holds.
      come: from their array to ours, one a leaf.
      go: from ours to theirs.
      cut: whether theirs may have more rows than there are tokens.
      entry: where theirs is one entry of each leaf alone (one expert's matrix), which; `come` gives that entry, and `go`
        takes it out of the whole leaf.
    """

    name: str
    leaves: tuple[str, ...]
    come: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    go: Callable[..., np.ndarray]
    cut: bool = False
    entry: int | None = None


class Layout(ABC):
    """A family in another layout.

    Attributes:
      models: their `model_type`s that this layout reads.
      table: our name of the token embeddings.
      shown: sizes that the shapes and names of tensors show; all others are only in the config.
    """

    models: tuple[str, ...] = ()
    table = "table"
    shown: tuple[str, ...] = ("layers", "hidden")

    @abstractmethod
    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the family's function; raises UserError for a variant that the family does not have."""

    @abstractmethod
    def config(self, trunk: Any) -> dict[str, Any]:
        """Their config of a model of ours."""

    @abstractmethod
    def tensors(self, family: Family, rows: int) -> Iterator[Tensor]:
        """Every tensor of a model; `rows` of the embedding table are ours, padding included."""

    @abstractmethod
    def spare(self, name: str) -> bool:
        """Whether a tensor of theirs only repeats others, such as a tied head."""


def same(name: str, leaf: str) -> Tensor:
    """Alike on both sides."""
    return Tensor(name, (leaf,), lambda x: (x,), lambda x: x)


def turned(name: str, leaf: str) -> Tensor:
    """A matrix: theirs is [outputs, inputs]."""
    return Tensor(name, (leaf,), lambda x: (x.T,), lambda x: x.T)


def turned_entry(name: str, leaf: str, entry: int) -> Tensor:
    """One expert's matrix: theirs is [outputs, inputs], ours one of [experts, inputs, outputs]."""
    return Tensor(name, (leaf,), lambda x: (x.T,), lambda x: x[entry].T, entry=entry)


def dense(name: str, leaf: str) -> Iterator[Tensor]:
    """A dense layer: a matrix and its bias."""
    yield turned(f"{name}.weight", leaf)
    yield same(f"{name}.bias", f"{leaf}_bias")


def norm(name: str, leaf: str) -> Iterator[Tensor]:
    """A norm with scale and bias."""
    yield same(f"{name}.weight", f"{leaf}/scale")
    yield same(f"{name}.bias", f"{leaf}/bias")


def rows_padded(name: str, leaf: str, rows: int, size: int) -> Tensor:
    """A table of `size` tokens; ours has rows of zeros behind it."""
    pad = lambda x: np.concatenate([x, np.zeros((rows - size, *x.shape[1:]), x.dtype)])
    return Tensor(name, (leaf,), lambda x: (pad(x),), lambda x: x[:size], cut=True)


def heads_in(name: str, leaf: str, heads: int) -> Tensor:
    """A projection to heads: theirs [H K, D], ours [D, H, K]."""
    come = lambda x: (x.T.reshape(x.shape[1], heads, -1),)
    return Tensor(name, (leaf,), come, lambda x: x.reshape(x.shape[0], -1).T)


def heads_out(name: str, leaf: str, heads: int) -> Tensor:
    """A projection from heads: theirs [D, H K], ours [H, K, D]."""
    come = lambda x: (x.T.reshape(heads, -1, x.shape[0]),)
    return Tensor(name, (leaf,), come, lambda x: x.reshape(-1, x.shape[-1]).T)


def heads_bias(name: str, leaf: str, heads: int) -> Tensor:
    """A bias of heads: theirs [H K], ours [H, K]."""
    return Tensor(name, (leaf,), lambda x: (x.reshape(heads, -1),), lambda x: x.reshape(-1))


def joined(name: str, parts: tuple[Tensor, ...]) -> Tensor:
    """Several of these behind each other along their first dimension, all of one size."""
    come = lambda x: tuple(
        y for part, piece in zip(parts, np.split(x, len(parts)), strict=True) for y in part.come(piece)
    )
    go = lambda *ours: np.concatenate([part.go(x) for part, x in zip(parts, ours, strict=True)])
    return Tensor(name, tuple(leaf for part in parts for leaf in part.leaves), come, go)
