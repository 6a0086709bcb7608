"""Spans of a text put behind it: the rearrangement under span corruption, mixtures of denoisers and causal masking.

A document `a b c d e` whose spans `b` and `d e` are hidden becomes the inputs `a S1 c S2` and the targets
`S1 b S2 d e end`, S1, S2, .. being sentinels. Both together rebuild it. Every document of a packed row is rearranged on
its own, in arrays of fixed shape, inside the jitted step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from models.vocabulary import Vocabulary
from objectives.documents import Documents, documents
from partitioning import UserError


class Side(NamedTuple):
    """Inputs, targets, or both behind each other: what a trunk reads; segments are those of the batch, 0 for padding."""

    tokens: Int[Array, "B N"]
    segments: Int[Array, "B N"]
    positions: Int[Array, "B N"]


class Noise(NamedTuple):
    """What is done to a batch.

    hidden: which tokens are in spans; a run of them is one span, within its document.
    ends: after which tokens an end is written to the targets.
    mode: what is written before a document's inputs, told to all of its tokens; negative for nothing.
    """

    hidden: Bool[Array, "B S"]
    ends: Bool[Array, "B S"]
    mode: Int[Array, "B S"]


class Extra(NamedTuple):
    """Ids behind a vocabulary, in the rows that pad its embedding table: they stand for no token of any text.

    first: the first sentinel; the modes come before it.
    end: one past the last sentinel.
    """

    first: int
    end: int


def extra(vocabulary: Vocabulary, rows: int, *, modes: int, sentinels: int, owner: str) -> Extra:
    """Ids for modes and sentinels.

    Args:
      vocabulary: of the tokens.
      rows: of the embedding table.
      modes, sentinels: how many of each.
      owner: whose they are, for the error.

    Raises:
      UserError: the table has too few rows.
    """
    end = vocabulary.size + modes + sentinels
    if end > rows:
        raise UserError(
            f"{owner} needs {modes + sentinels} ids behind the vocabulary of {vocabulary.size} and the embedding table has "
            f"{rows} rows: set models.Trunk.vocab_multiple = {-(-end // 128) * 128}"
        )
    return Extra(vocabulary.size + modes, end)


def whole_text(owner: str, batch: Any) -> None:
    """Refuses data that says which tokens are learned: spans cut across such a mask.

    Raises:
      UserError: there is a `loss_mask`.
    """
    if "loss_mask" in batch:
        raise UserError(f"{owner} learns whole documents and the data has a loss_mask: give it plain text")


def most(grown: Int[np.ndarray, " S_and_1"]) -> int:
    """The most that the documents of a row can grow to together, exactly.

    Args:
      grown: what a document of 0, 1, .., S tokens grows to; a row holds any documents of S tokens in all.
    """
    best = np.zeros(len(grown), np.int64)
    for room in range(1, len(grown)):
        best[room] = (grown[1 : room + 1] + best[room - 1 :: -1][:room]).max()
    return int(best.max(initial=0))


def longer(length: int, needed: int) -> int:
    """Slots for `needed` tokens: rows grow by a multiple of 8, which tiles want."""
    return length + -(-(needed - length) // 8) * 8


class _Written(NamedTuple):
    """What the tokens write to one side, each some things in order."""

    there: Sequence[Bool[Array, "B S"]]
    values: Sequence[Int[Array, "B S"]]

    @property
    def things(self) -> Int[Array, "B S"]:
        """How many things each token writes."""
        return jnp.stack(list(self.there)).sum(0, dtype=jnp.int32)


def _written(
    tokens: Int[Array, "B S"], noise: Noise, found: Documents, first_sentinel: int, end: int
) -> tuple[_Written, _Written]:
    """What goes to the inputs and what to the targets."""
    slots = jnp.arange(tokens.shape[1])
    opens = found.start == slots
    before = jnp.pad(noise.hidden[:, :-1], ((0, 0), (1, 0)))
    starts = noise.hidden & (~before | opens)
    sentinel = first_sentinel + found.before(starts.astype(jnp.int32))
    inside = found.size > 0
    inputs = _Written(
        (opens & inside & (noise.mode >= 0), inside & (~noise.hidden | starts)),
        (noise.mode, jnp.where(starts, sentinel, tokens)),
    )
    ended = noise.ends & inside
    return inputs, _Written((starts, noise.hidden, ended), (sentinel, tokens, jnp.full(tokens.shape, end)))


def _laid(
    texts: Sequence[tuple[_Written, Int[Array, "B S"], Int[Array, "B S"]]],
    segments: Int[Array, "B S"],
    width: int,
    pad: int,
) -> tuple[Side, Int[Array, "B N"]]:
    """Writes (things, their document's first slot, each token's first position) out; and which of `texts`, from 1."""
    slots, tokens, places, parts = [], [], [], []
    for part, (written, base, position) in enumerate(texts, 1):
        at = position
        for there, value in zip(written.there, written.values, strict=True):
            # What is not there writes past the row, where the write is dropped.
            slots.append(jnp.where(there, base + at, width))
            tokens.append(value)
            places.append(at)
            parts.append(jnp.full(value.shape, part))
            at = at + there
    where = jnp.concatenate(slots, axis=1)

    def put(values: Sequence[Array], blank: int) -> Int[Array, "B N"]:
        one = lambda at, value: jnp.full(width, blank, jnp.int32).at[at].set(value.astype(jnp.int32), mode="drop")
        return jax.vmap(one)(where, jnp.concatenate(list(values), axis=1))

    side = Side(put(tokens, pad), put([segments] * len(slots), 0), put(places, 0))
    return side, put(parts, 0)


def apart(
    batch: dict[str, Array], noise: Noise, *, first_sentinel: int, end: int, pad: int, inputs: int, targets: int
) -> tuple[Side, Side]:
    """Inputs and targets each in rows of their own, as an encoder and a decoder read them.

    Args:
      batch: text.
      noise: what is hidden.
      first_sentinel: the id of a document's first sentinel, the others follow it.
      end: the id of an end.
      pad: the id of padding.
      inputs, targets: lengths of the rows, at least what `most` says.
    """
    found = documents(batch["segments"], batch["positions"])
    sides = _written(batch["tokens"], noise, found, first_sentinel, end)
    out = []
    for written, width in zip(sides, (inputs, targets), strict=True):
        base = jnp.cumsum(written.things, axis=1) - written.things
        text = (written, found.first(base), found.before(written.things))
        out.append(_laid([text], batch["segments"], width, pad)[0])
    return out[0], out[1]


def behind(
    batch: dict[str, Array], noise: Noise, *, first_sentinel: int, end: int, pad: int, width: int
) -> tuple[Side, Bool[Array, "B N"]]:
    """Each document's targets behind its inputs, as a decoder alone reads them, and where the targets are.

    Args:
      batch, noise, first_sentinel, end, pad: as in `apart`.
      width: length of the rows, at least what `most` says.
    """
    found = documents(batch["segments"], batch["positions"])
    inputs, targets = _written(batch["tokens"], noise, found, first_sentinel, end)
    both = inputs.things + targets.things
    base = found.first(jnp.cumsum(both, axis=1) - both)
    after = found.sum(inputs.things) + found.before(targets.things)
    texts = [(inputs, base, found.before(inputs.things)), (targets, base, after)]
    side, part = _laid(texts, batch["segments"], width, pad)
    return side, part == 2
