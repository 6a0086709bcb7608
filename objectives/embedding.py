"""Texts to vectors, for objectives that compare texts."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from models.masks import Bidirectional
from models.pooling import Pooling, pool, unit
from objectives.draws import Draws

TEXT = ("tokens", "segments", "positions")


def text_fields(*names: str) -> tuple[str, ...]:
    """The batch fields of nested texts."""
    return tuple(f"{name}/{field}" for name in names for field in TEXT)


def routes(batch: dict[str, Any]) -> dict[str, Array]:
    """What a trunk is called with for routers that go by a row's domain: its source, where the batch is of a mixture."""
    return {"routes": batch["source"]} if "source" in batch else {}


def embed(tree: Any, batch: dict[str, Any], name: str, key: Draws | None, pooling: Pooling) -> Float[Array, "B D"]:
    """Unit vectors of the batch's texts called `name`, one text a row; no dropout without a key, a row's source its domain."""
    segments = batch[f"{name}/segments"]
    keys: jax.Array | None = None if key is None else key(f"dropout/{name}")
    out = tree(
        batch[f"{name}/tokens"],
        segments=segments,
        positions=batch[f"{name}/positions"],
        mask=Bidirectional(),
        keys=keys,
        **routes(batch),
    )
    return unit(pool(out.hidden, segments, pooling))
