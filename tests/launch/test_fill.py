"""Filling masks: which token stands where, what its chance is, and that specials are no answer."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from launch.fill import STRETCH, fill, show
from partitioning.errors import UserError


@dataclasses.dataclass(frozen=True)
class Specials:
    """Ids 0 to 5."""

    pad: int = 0
    bos: int = 1
    eos: int = 2
    mask: int = 3
    cls: int = 4
    sep: int = 5


class Letters:
    """A token a letter: a is 6."""

    specials = Specials()

    def encode(self, text):
        return np.array([ord(c) - ord("a") + 6 for c in text], np.int32)

    def decode(self, ids):
        return "".join(chr(int(i) - 6 + ord("a")) for i in ids)


class Neighbours(nnx.Module):
    """Scores the letter after the one on the left highest, then that letter itself; a special highest of all."""

    def __call__(self, tokens, *, segments, positions):
        # A place that a neighbour must not be read across tells by a letter that no test expects.
        left = jnp.where((positions > 0) & (segments > 0), jnp.roll(tokens, 1, axis=1), 30)
        return types.SimpleNamespace(hidden=left[..., None])

    def scores(self, hidden):
        left = hidden[..., 0]
        ids = jnp.arange(32)
        near, same = ids == left[..., None] + 1, ids == left[..., None]
        logits = jnp.where(near, jnp.log(8.0), jnp.where(same, jnp.log(2.0), 0.0))
        return types.SimpleNamespace(logits=lambda: logits.at[..., 2].set(50.0))


def test_each_mask_is_filled_from_its_own_place():
    first, second = fill(Neighbours(), Letters(), "a[MASK]ch[MASK]", count=2)
    assert [g.text for g in first] == ["b", "a"]
    assert [g.text for g in second] == ["i", "h"]
    assert [g.probability for g in first] == pytest.approx([8 / 34, 2 / 34])  # 24 others have 1 each, specials none


def test_a_text_may_be_longer_than_one_stretch():
    (guesses,) = fill(Neighbours(), Letters(), "ab" * STRETCH + "[MASK]", count=1)
    assert [g.text for g in guesses] == ["c"]


def test_shown():
    assert show(Neighbours(), Letters(), "a[MASK]c", count=1) == "abc\n  1: 'b' 23.5%"


def test_a_piece_begins_with_its_space():
    """As in trained vocabularies: ` the` is one piece, so the space before a mask belongs to what fills it."""

    class Words(Letters):
        """A letter with the space before it is one token."""

        def encode(self, text):
            return np.array([ord(c) - ord("a") + 6 for c in text.replace(" the", " t") if c != " "], np.int32)

    assert show(Neighbours(), Words(), "a [MASK] c", count=1).startswith("ab c\n")


def test_nothing_to_fill():
    with pytest.raises(UserError, match="expected \\[MASK\\]"):
        fill(Neighbours(), Letters(), "abc")
