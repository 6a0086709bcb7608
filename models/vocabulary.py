"""What a trunk knows of its tokens: how many there are and which are special."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Sizes and special ids.

    Args:
      size: token ids are below this.
      pad, bos, eos, mask, cls, sep: the special ids, all different; -1 for one that the tokenizer does not have.
      frequencies: gives the share of each id in the text to train on; None where that is not known. Asked for when a module
        wants it, and no part of what makes two vocabularies the same.
    """

    size: int
    pad: int
    bos: int
    eos: int
    mask: int
    cls: int
    sep: int
    frequencies: Callable[[], Float[np.ndarray, V]] | None = field(default=None, compare=False, repr=False)

    @property
    def specials(self) -> tuple[int, ...]:
        """The special ids, ascending."""
        ids = (self.pad, self.bos, self.eos, self.mask, self.cls, self.sep)
        return tuple(sorted(i for i in ids if i >= 0))

    def padded(self, multiple: int) -> int:
        """Rows of an embedding table: the size, rounded up so that it divides over a mesh."""
        return -(-self.size // multiple) * multiple

    def is_special(self, tokens: Int[Array, "*shape"]) -> jax.Array:
        """Where tokens are special: a boolean of the same shape."""
        return jnp.isin(tokens, jnp.asarray(self.specials))

    def random_ordinary(self, key: jax.Array, shape: tuple[int, ...]) -> Int[Array, "*shape"]:
        """Uniform draws over the ids that are not special."""
        ids = jax.random.randint(key, shape, 0, self.size - len(self.specials))
        for special in self.specials:
            ids = ids + (ids >= special)
        return ids


_WITHIN: ContextVar[Vocabulary | None] = ContextVar("vocabulary", default=None)


@contextmanager
def within(vocabulary: Vocabulary) -> Iterator[None]:
    """The modules that are built inside are of a trunk with this vocabulary."""
    token = _WITHIN.set(vocabulary)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def of_trunk() -> Vocabulary | None:
    """The vocabulary of the trunk that is being built; None outside. For modules that go by token ids."""
    return _WITHIN.get()
