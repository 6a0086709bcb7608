"""The mask algebra: who may see whom, as pytrees with static structure and array leaves.

A mask answers `allowed(query, key)` for two sets of tokens. `&` and `|` combine masks, and the segment rule is always
added: a token sees its own document only, and padding (segment 0) sees nothing and is seen by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from partitioning.errors import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """Where the tokens of one side stand.

    Args:
      index: slots in the row, `[S]`; a decoder that reads from a cache starts at the cache's length.
      segments: the document of each token, 0 for padding.
      positions: places within the document.
    """

    index: Int[Array, S]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the structure, not a leaf."""
    return field(metadata={"static": True}, **kwargs)


class Mask:
    """Base of all masks."""

    @property
    def causal(self) -> bool:
        """Whether no query ever sees a key in a later slot: what a recurrent mixer needs."""
        return False

    @property
    def mutual(self) -> bool:
        """Whether whoever is seen sees back: no order hides one token from another."""
        return False

    def allowed(self, query: Tokens, key: Tokens) -> Bool[Array, "B Q K"]:
        """Whether a query may see a key; dimensions of size 1 broadcast."""
        raise TypeError(f"{type(self).__name__} is a mask without a rule: define `allowed`")

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """What both masks allow."""

    left: Mask
    right: Mask

    @property
    def causal(self) -> bool:
        return self.left.causal or self.right.causal

    @property
    def mutual(self) -> bool:
        return self.left.mutual and self.right.mutual

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return self.left.allowed(query, key) & self.right.allowed(query, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Either(Mask):
    """What one of the masks allows, or both."""

    left: Mask
    right: Mask

    @property
    def causal(self) -> bool:
        return self.left.causal and self.right.causal

    @property
    def mutual(self) -> bool:
        return self.left.mutual and self.right.mutual

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return self.left.allowed(query, key) | self.right.allowed(query, key)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bidirectional(Mask):
    """Every token sees its whole document."""

    mutual = True

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return jnp.ones((1, 1, 1), bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """A token sees itself and what stands before it."""

    causal = True

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return (key.index[None, :] <= query.index[:, None])[None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Mask):
    """Causal, and every token sees the whole prefix of its document.

    Args:
      inside: which tokens belong to a prefix, `[B, S]` over the keys.
    """

    inside: Bool[Array, "B K"]

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return Causal().allowed(query, key) | self.inside[:, None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window(Mask):
    """A token sees `before` places back and `after` places ahead, within its document.

    Args:
      before, after: distances in tokens, at least 0.
    """

    before: int = static()
    after: int = static(default=0)

    def __post_init__(self):
        if self.before < 0 or self.after < 0:
            raise UserError(f"Window(before={self.before}, after={self.after}): distances are at least 0")

    @property
    def causal(self) -> bool:
        return self.after == 0

    @property
    def mutual(self) -> bool:
        return self.after == self.before

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        ahead = key.positions[:, None, :] - query.positions[:, :, None]
        return (ahead <= self.after) & (ahead >= -self.before)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk(Mask):
    """A token sees its own chunk of the document.

    Args:
      size: tokens in a chunk, at least 1.
    """

    size: int = static()
    mutual = True

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"Chunk(size={self.size}): a chunk has at least one token")

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return key.positions[:, None, :] // self.size == query.positions[:, :, None] // self.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sentinel(Mask):
    """Every token sees the first `count` tokens of its document, and they see it all.

    Args:
      count: global tokens at a document's start.
    """

    count: int = static()
    mutual = True

    def __post_init__(self):
        if self.count < 0:
            raise UserError(f"Sentinel(count={self.count}): a number of tokens is at least 0")

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return (key.positions[:, None, :] < self.count) | (query.positions[:, :, None] < self.count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Permutation(Mask):
    """A token sees itself and what precedes it in a given order.

    Args:
      order: rank of each token, `[B, S]`, different within a document.
    """

    order: Int[Array, "B S"]

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return self.order[:, None, :] <= self.order[:, :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrix(Mask):
    """An arbitrary relation, such as random rows.

    Args:
      visible: `[B, Q, K]`.
    """

    visible: Bool[Array, "B Q K"]

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return self.visible


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByRow(Mask):
    """One mask for some rows and another for the rest: two modes in one batch.

    Args:
      choose: which rows take `yes`, `[B]`.
    """

    choose: Bool[Array, B]
    yes: Mask
    no: Mask

    @property
    def causal(self) -> bool:
        return self.yes.causal and self.no.causal

    @property
    def mutual(self) -> bool:
        return self.yes.mutual and self.no.mutual

    def allowed(self, query, key):
        """See `Mask.allowed`."""
        return jnp.where(self.choose[:, None, None], self.yes.allowed(query, key), self.no.allowed(query, key))


def lower(mask: Mask, query: Tokens, key: Tokens) -> Bool[Array, "B Q K"]:
    """A mask with the segment rule, as booleans: what the reference and XLA back ends take.

    Raises:
      UserError: the mask's arrays are not over these queries and keys; a relation over the tokens of one call cannot
        be used with a cache.
    """
    same = query.segments[:, :, None] == key.segments[:, None, :]
    try:
        allowed = mask.allowed(query, key)
        fits = jnp.broadcast_shapes(allowed.shape, same.shape) == same.shape
    except (TypeError, ValueError):
        fits = False
    if not fits:
        queries, keys = same.shape[1:]
        raise UserError(
            f"{type(mask).__name__}: the mask's arrays do not fit {queries} queries and {keys} keys: with a cache, a mask "
            "must say whom the new tokens see among all that it holds"
        )
    return allowed & same & (key.segments[:, None, :] > 0)
