"""Filling masks: which token stands where, what its chance is, and that specials are no answer."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from launch.fill import fill, show
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


class Neighbours:
    """Scores the letter after the one on the left highest, then that letter itself; a special highest of all."""

    def __call__(self, tokens, *, segments, positions):
        assert segments.tolist() == [[1] * tokens.shape[1]]
        assert positions.tolist() == [list(range(tokens.shape[1]))]
        self.tokens = tokens[0].tolist()
        return types.SimpleNamespace(hidden=jnp.concatenate([tokens[:, :1], tokens[:, :-1]], axis=1)[..., None])

    def scores(self, hidden):
        left = hidden[:, 0]
        ids = jnp.arange(32)
        logits = jnp.where(ids == left[:, None] + 1, jnp.log(8.0), jnp.where(ids == left[:, None], jnp.log(2.0), 0.0))
        return types.SimpleNamespace(logits=lambda: logits.at[:, 2].set(50.0))


def test_each_mask_is_filled_from_its_own_place():
    trunk = Neighbours()
    first, second = fill(trunk, Letters(), "a[MASK]ch[MASK]", count=2)
    assert trunk.tokens == [6, 3, 8, 13, 3]
    assert [g.text for g in first] == ["b", "a"]
    assert [g.text for g in second] == ["i", "h"]
    assert [g.probability for g in first] == pytest.approx([8 / 34, 2 / 34])  # 24 others have 1 each, specials none


def test_shown():
    assert show(Neighbours(), Letters(), "a[MASK]c", count=1) == "abc\n  1: 'b' 23.5%"


def test_nothing_to_fill():
    with pytest.raises(UserError, match="expected \\[MASK\\]"):
        fill(Neighbours(), Letters(), "abc")
