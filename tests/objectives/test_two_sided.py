"""Objectives of encoder-decoders: what each side reads, document by document, and the loss written out in float64."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, TWO_SIDED, VOCABULARY, modules, pair_batch, plain_batch
from flax import nnx
from probing import Heard, key_of, put

from models import Causal
from objectives import MASS, UL2, Fragment, Replace, Seq2Seq, SpanCorruption
from objectives.denoise import Side
from objectives.draws import draws
from objectives.span_corruption import Denoising
from objectives.two_sided import pushed
from partitioning import UserError

OBJECTIVES = {
    "mass": (MASS(), plain_batch),
    "one": (MASS(select=Fragment(share=0)), plain_batch),
    "all": (MASS(select=Fragment(share=1), replace=Replace(mask=1, random=0)), plain_batch),
    "spans": (SpanCorruption(density=0.4, shortest=2), plain_batch),
    "ul2": (UL2(shortest=3), plain_batch),
    "pairs": (Seq2Seq(), pair_batch),
}


def documents_of(tokens, segments, positions):
    """(row, segment) -> its tokens and places."""
    tokens, segments, positions = map(np.asarray, (tokens, segments, positions))
    keys = sorted({(b, segments[b, s]) for b, s in np.argwhere(segments > 0)})
    return {(b, n): (tokens[b, segments[b] == n], positions[b, segments[b] == n]) for b, n in keys}


def call_of(objective, batch):
    """The loss, the model, and what it was called with."""
    trunk = Heard(modules(objective, TWO_SIDED).trunk)
    loss = objective(SimpleNamespace(trunk=trunk), batch, step=0, key=key_of(batch))
    seen, call = trunk.calls[0]
    read = documents_of(seen, call["segments"], call["positions"])
    return loss, trunk.trunk, read, documents_of(call["targets"], call["target_segments"], call["target_positions"])


def body(tokens):
    """Without a special token at either end."""
    special = np.isin(tokens, VOCABULARY.specials)
    return tokens[int(special[0]) : len(tokens) - int(special[-1] and len(tokens) > int(special[0]))]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "mass" else ()) for n in OBJECTIVES])
def test_the_loss_is_that_of_each_document_by_itself(name):
    """What the decoder is to write is what it reads next; the last is told by the data. Mean over all targets, by numpy."""
    objective, make = OBJECTIVES[name]
    with jax.enable_x64(True):
        batch = put(make(rows=6))
        loss, trunk, read, written = call_of(objective, batch)
        trunk = nnx.merge(*nnx.split(trunk))
        total, count = 0.0, 0
        for key, (inputs, places) in written.items():
            tokens, where = read[key]
            one = lambda x: jnp.asarray(np.asarray(x)[None])
            ones = lambda x: jnp.ones((1, len(x)), int)
            hidden = trunk(
                one(tokens), segments=ones(tokens), positions=one(where), targets=one(inputs),
                target_segments=ones(inputs), target_positions=one(places), target_mask=Causal(),
            ).hidden  # fmt: skip
            scores = trunk.scores(hidden)
            last = wanted_last(objective, batch, key, places)
            wanted = [*inputs[1:], last]
            size = sentinels(objective) if isinstance(objective, Denoising) else VOCABULARY.size
            logits = np.asarray(scores.hidden @ scores.table.T)[0, :, :size]
            log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            total, count = total - log[np.arange(len(wanted)), wanted].sum(), count + len(wanted)
    term = next(term for name, term in loss.terms.items() if name in ("mass", "denoising", "seq2seq"))
    np.testing.assert_allclose(term.total, total, rtol=1e-9)
    assert term.weight == count > 0


def sentinels(objective):
    """Ids that a denoiser scores: tokens, modes and sentinels."""
    return VOCABULARY.size + len(objective.modes()) + int(objective._tables(12)[1].max())


def wanted_last(objective, batch, key, places):
    """The last token that a document's decoder writes."""
    if isinstance(objective, MASS):
        row, segment = key
        tokens, _ = documents_of(*(batch[name] for name in ("tokens", "segments", "positions")))[row, segment]
        return tokens[places[-1]]
    if isinstance(objective, Seq2Seq):
        return np.asarray(batch["positive/tokens"])[key[0], places[-1]]
    return VOCABULARY.eos


def test_a_fragment_of_one_is_masked_language_modelling_and_of_all_a_causal_one():
    batch = put(plain_batch(rows=16))
    whole = documents_of(*(batch[name] for name in ("tokens", "segments", "positions")))
    _, _, read, written = call_of(OBJECTIVES["one"][0], batch)
    assert all(list(inputs) == [VOCABULARY.mask] for inputs, _ in written.values())
    for key, (tokens, _) in read.items():
        changed = np.flatnonzero(tokens != whole[key][0])
        assert set(changed) <= set(written[key][1] if key in written else ())
    _, _, read, written = call_of(OBJECTIVES["all"][0], batch)
    for key, (inputs, places) in written.items():
        text, inside = whole[key][0], body(whole[key][0])
        np.testing.assert_array_equal(inputs, [VOCABULARY.mask, *inside[:-1]])
        np.testing.assert_array_equal(text[places], inside)
        np.testing.assert_array_equal(np.isin(np.arange(len(text)), places), read[key][0] == VOCABULARY.mask)
    assert written.keys() == {key for key, (tokens, _) in whole.items() if len(body(tokens))}


def test_a_decoder_reads_the_neighbour_of_what_it_writes_and_no_other_token():
    """Where the token before is of another document or place, something else stands."""
    side = Side(jnp.asarray([[7, 8, 9, 10]]), jnp.asarray([[1, 1, 1, 2]]), jnp.asarray([[1, 2, 5, 6]]))
    np.testing.assert_array_equal(pushed(side, 3), [[3, 7, 3, 3]])


def test_a_pair_is_read_and_written_whole():
    batch = put(pair_batch(rows=6))
    _, trunk, read, written = call_of(Seq2Seq(), batch)
    sides = [
        documents_of(*(batch[f"{side}/{name}"] for name in ("tokens", "segments", "positions")))
        for side in ("query", "positive")
    ]
    assert read.keys() == written.keys() == sides[0].keys()
    for key, (tokens, places) in sides[0].items():
        np.testing.assert_array_equal(read[key], (tokens, places))
        np.testing.assert_array_equal(written[key][0], [trunk.start, *sides[1][key][0][:-1]])


def test_a_fragment_is_one_run_of_the_stated_length_anywhere():
    """Every place of a five-token body as often as the others; round(n / 2) tokens, places kept, specials never."""
    rows = 2000
    tokens = np.tile([VOCABULARY.bos, 9, 10, 11, 12, 13, VOCABULARY.eos, 14, 0], (rows, 1))
    segments = np.tile([1] * 7 + [2, 0], (rows, 1))
    batch = put({"tokens": tokens, "segments": segments, "positions": np.tile([*range(7), 0, 0], (rows, 1))})
    key = draws(jax.random.key(1), 0, jnp.arange(rows), rows)
    found = Fragment(share=0.5)(batch, VOCABULARY, step=0, key=key)
    slots = [tuple(s[w > 0]) for s, w in zip(np.asarray(found.positions), np.asarray(found.weight), strict=True)]
    counts = Counter(slots)
    assert set(counts) == {(k, k + 1, 7) for k in range(1, 5)}
    np.testing.assert_allclose([n / rows for n in counts.values()], 0.25, atol=0.04)


def test_what_is_refused():
    trunk = modules(SpanCorruption(), TRUNK).module("trunk")
    for objective in (MASS(), Seq2Seq()):
        with pytest.raises(
            UserError, match=rf"{type(objective).__name__} writes beside .* training.Run.model = @models.t5"
        ):
            objective.companions(trunk, None)
    two_sided = modules(MASS(), TWO_SIDED).module("trunk")
    with pytest.raises(UserError, match="expected an objective that gives it `targets`, such as SpanCorruption"):
        two_sided(jnp.zeros((1, 3), int), segments=jnp.ones((1, 3), int), positions=jnp.arange(3)[None])
