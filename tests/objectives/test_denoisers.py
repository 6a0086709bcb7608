"""Denoisers invert: from inputs and targets numpy rebuilds every document, and the counts are those that T5 rounds to."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY, modules, plain_batch
from probing import Heard, key_of, leaves, loss_of, put, split

from models import Causal, Matrix
from objectives import CM3, UL2, CausalLM, Denoiser, SpanCorruption
from objectives.denoise import apart, behind, extra, most
from objectives.draws import draws
from objectives.span_corruption import MIXTURE, random_spans
from partitioning import UserError

ROWS, LENGTH = 64, 96
# Two documents of every kind of end, short and long; a wide room for sentinels.
SENTINEL, END, PAD = 1000, VOCABULARY.eos, VOCABULARY.pad


def packed(seed=0, shortest=1):
    """Rows of documents of 1 to LENGTH tokens, each with or without specials at its ends; the last row is padding."""
    draw = np.random.default_rng(seed)
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "segments", "positions")}
    for row in range(ROWS - 1):
        start, segment = 0, 1
        while start < LENGTH:
            size = min(int(draw.choice([1, 2, 3, 5, 9, 30, 96], p=[0.1, 0.1, 0.2, 0.2, 0.2, 0.1, 0.1])), LENGTH - start)
            size = max(size, min(shortest, LENGTH - start))
            ids = draw.integers(6, VOCABULARY.size, size)
            if draw.random() < 0.6:
                ids[0] = VOCABULARY.bos
            if draw.random() < 0.6:
                ids[-1] = VOCABULARY.eos
            here = slice(start, start + size)
            batch["tokens"][row, here], batch["segments"][row, here] = ids, segment
            batch["positions"][row, here] = np.arange(size)
            start, segment = start + size, segment + 1
            if draw.random() < 0.1:
                break
    return batch | {"row": np.arange(ROWS, dtype=np.int32)}


def texts(side, where=None):
    """(row, segment) -> ids, in a side's order; positions must run from 0, or on from the other side's."""
    tokens, segments, positions = (np.asarray(side[name]) for name in ("tokens", "segments", "positions"))
    found: dict[tuple[int, int], list[int]] = {}
    places: dict[tuple[int, int], list[int]] = {}
    for b, s in np.argwhere((segments > 0) if where is None else (segments > 0) & where):
        found.setdefault((b, segments[b, s]), []).append(int(tokens[b, s]))
        places.setdefault((b, segments[b, s]), []).append(int(positions[b, s]))
    for place in places.values():
        assert place == list(range(place[0], place[0] + len(place)))
    return found


def rebuilt(inputs, targets, *, moded, each_ends):
    """One document from its inputs and its targets."""
    if not targets:
        return inputs
    inputs = inputs[1:] if moded else inputs
    spans: dict[int, list[int]] = {}
    if not each_ends:
        assert targets[-1] == END
        targets = targets[:-1]
    for token in targets:
        if token >= SENTINEL:
            last = token
            assert token == SENTINEL + len(spans), "sentinels count up"
            spans[token] = []
        else:
            spans[last].append(token)
    if each_ends:
        assert all(span.pop() == END for span in spans.values())
    assert all(spans.values()), "a span has at least one token"
    return [t for token in inputs for t in (spans.pop(token) if token >= SENTINEL else [token])]


OBJECTIVES = {
    "t5": SpanCorruption(shortest=2),
    "dense": SpanCorruption(density=0.5, span=1.0, shortest=2),
    "rare": SpanCorruption(density=0.01, span=9.0, shortest=9),
    "ul2": UL2(shortest=3),
    "whole": SpanCorruption(shortest=LENGTH + 1),
    "cm3": CM3(mean=2.0, most=5, shortest=1 + 1),
    "cm3 none": CM3(most=0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_denoiser_inverts(name, seed):
    """Apart and behind, every document comes back whole, in rows no longer than promised."""
    objective, batch = OBJECTIVES[name], packed(seed)
    noise = objective.noise(put(batch), VOCABULARY, key=key_of(put(batch)))
    room = objective.room(LENGTH)
    width = room if isinstance(room, int) else room[0]
    how = {"first_sentinel": SENTINEL, "end": END, "pad": PAD}
    inputs, targets = apart(put(batch), noise, inputs=width, targets=width, **how)
    side, target = behind(put(batch), noise, width=width, **how)
    target = np.asarray(target)
    whole = texts(batch)
    forms = [
        (texts(inputs._asdict()), texts(targets._asdict())),
        (texts(side._asdict(), ~target), texts(side._asdict(), target)),
    ]
    assert forms[0] == forms[1]
    texts(side._asdict())
    moded = name == "ul2"
    for key, document in whole.items():
        there, behind_it = forms[0][0][key], forms[0][1].get(key, [])
        assert rebuilt(there, behind_it, moded=moded, each_ends="cm3" in name) == document
        if moded and behind_it:
            assert VOCABULARY.size <= there[0] < VOCABULARY.size + 3
    assert forms[0][0].keys() == whole.keys()
    assert bool(forms[0][1]) == (name not in ("whole", "cm3 none"))
    if not isinstance(room, int):
        assert max(target.sum(1)) <= room[2]
        assert max((np.asarray(inputs.segments) > 0).sum(1)) <= room[1]


def bodies_by_hand(batch):
    """(row, segment) -> tokens without a special at either end."""
    found = {}
    for key, ids in texts(batch).items():
        ids = ids[1:] if ids[0] in VOCABULARY.specials else ids
        found[key] = len(ids[:-1] if ids and ids[-1] in VOCABULARY.specials else ids)
    return found


@pytest.mark.parametrize("objective", [SpanCorruption(shortest=2), UL2(shortest=5)], ids=["t5", "ul2"])
def test_the_counts_are_exact(objective):
    """Hidden tokens and spans of every document, as T5's code rounds them; every denoiser comes about equally often."""
    batch = packed(3)
    noise = objective.noise(put(batch), VOCABULARY, key=key_of(put(batch)))
    hidden, mode = np.asarray(noise.hidden), np.asarray(noise.mode)
    seen = Counter()
    for (row, segment), size in bodies_by_hand(batch).items():
        here = np.flatnonzero(batch["segments"][row] == segment)
        mask = hidden[row, here]
        count, runs = int(mask.sum()), int(np.diff(mask.astype(int), prepend=0).clip(0).sum())
        if size < objective.shortest:
            assert count == 0
            assert (mode[row, here] == -1).all()
            continue
        fits = []
        for one in objective.mixture():
            tokens = min(max(round(float(np.float32(size) * np.float32(one.density))), 1), size - 1)
            spans = 1 if one.span is None else max(round(tokens / one.span), 1)
            named = VOCABULARY.size + "RSX".index(one.mode) if objective.modes() else -1
            if (tokens, min(spans, size - tokens), named) == (count, runs, mode[row, here[0]]):
                fits.append(one)
        assert fits, (size, count, runs)
        seen[len(fits)] += 1
        assert set(mode[row, here]) == {mode[row, here[0]]}
        if fits[0].mode == "S":
            body = here[1:] if batch["tokens"][row, here[0]] in VOCABULARY.specials else here
            assert hidden[row, body[size - count : size]].all()
    assert seen.total() > 50


def test_all_ways_to_cut_are_equally_likely():
    """Six tokens, three hidden in two spans: each of the 2 x 2 masks comes as often as the others."""
    rows, size, noise, spans = 4096, 6, 3, 2
    full = lambda n: jnp.full((rows, size), n)
    draw = jax.random.uniform(jax.random.key(0), (rows, size))
    found = Counter(map(tuple, np.asarray(jax.vmap(random_spans)(full(0), full(size), full(noise), full(spans), draw))))
    expected = set()
    for hidden in combinations(range(size), noise):
        mask = np.isin(np.arange(size), hidden)
        if not mask[0] and mask[-1] and np.diff(mask.astype(int), prepend=0).clip(0).sum() == spans:
            expected.add(tuple(mask))
    assert found.keys() == expected
    np.testing.assert_allclose([n / rows for n in found.values()], 1 / len(expected), atol=0.03)


def test_borders_of_moved_spans_are_equally_likely():
    """One span of a document of four tokens: all ten intervals, as often; the number of spans is Poisson's, capped."""
    rows = 4096
    batch = {"tokens": jnp.full((rows, 4), 9), "segments": jnp.ones((rows, 4), jnp.int32)}
    batch |= {"positions": jnp.tile(jnp.arange(4), (rows, 1))}
    key = draws(jax.random.key(0), 0, jnp.arange(rows), rows)
    noise = CM3(mean=1.0, most=1, shortest=2).noise(batch, VOCABULARY, key=key)
    found = Counter(map(tuple, np.asarray(noise.hidden)))
    none = found.pop((False,) * 4) / rows
    np.testing.assert_allclose(none, np.exp(-1), atol=0.03)
    assert len(found) == 10
    np.testing.assert_allclose([n / rows for n in found.values()], (1 - none) / 10, atol=0.02)


def test_no_spans_are_causal_language_modelling():
    """CM3 without spans, bit for bit, loss and gradients."""

    def value_and_gradient(objective):
        states, merge = split(modules(CausalLM()))
        batch = put(plain_batch(rows=4))
        # Not jitted, since the compiler fuses each program in its own way, which moves last bits.
        return jax.value_and_grad(lambda s: loss_of(objective, merge(s), batch))(states)

    with jax.enable_x64(True):
        (one, gradient), (other, theirs) = map(value_and_gradient, (CM3(most=0), CausalLM()))
    assert one == other
    theirs = leaves(theirs)
    for name, leaf in leaves(gradient).items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.mark.parametrize("name", ["t5", "ul2", "cm3"])
def test_the_loss_by_hand(name):
    """The relation and the sum over the rearranged text written out, in float64."""
    objective = {"t5": SpanCorruption(shortest=2), "ul2": UL2(shortest=2), "cm3": CM3(mean=2.0, shortest=2)}[name]
    batch = put(plain_batch(rows=8))
    with jax.enable_x64(True):
        trunk = Heard(modules(objective, partial(TRUNK, vocab_multiple=64)).trunk)
        loss = objective(SimpleNamespace(trunk=trunk), batch, step=0, key=key_of(batch))
        seen, call = trunk.calls[0]
        noise = objective.noise(batch, VOCABULARY, key=key_of(batch))
        width, modes = seen.shape[1], len(objective.modes()) if name != "cm3" else 0
        side, target = behind(batch, noise, first_sentinel=VOCABULARY.size + modes, end=END, pad=PAD, width=width)
        np.testing.assert_array_equal(seen, side.tokens)
        segments, target = np.asarray(side.segments), np.asarray(target)
        slots = np.arange(width)
        relation = np.tile(slots[None, :] <= slots[:, None], (8, 1, 1))
        if name != "cm3":
            relation |= ((segments > 0) & ~target)[:, None, :]
        same = segments[:, :, None] == segments[:, None, :]
        place = {"segments": side.segments, "positions": side.positions}
        hidden = trunk.trunk(side.tokens, mask=Matrix(jnp.asarray(relation & same)), **place).hidden
        logits = np.asarray(hidden @ trunk.trunk.table.get_value().T)
    ids = VOCABULARY.size + modes + (4 if name == "cm3" else int(objective._tables(12)[1].max()))
    logits = logits[..., :ids]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total, count = 0.0, 0
    for b, before in np.argwhere(segments[:, 1:] == segments[:, :-1]):
        t = before + 1
        token = int(seen[b, t])
        if segments[b, t] and (token < VOCABULARY.size if name == "cm3" else target[b, t]):
            total, count = total - log[b, t - 1, token], count + 1
    term = loss.terms["cm3" if name == "cm3" else "denoising"]
    np.testing.assert_allclose(term.total, total, rtol=1e-9)
    assert term.weight == count > 0
    assert isinstance(call["mask"], Causal) == (name == "cm3")


def test_the_most_that_rows_grow_to_is_the_best_of_all_cuts():
    """Against all ways to cut a row of nine slots."""
    cuts = lambda n: [[]] if n == 0 else [[k, *rest] for k in range(1, n + 1) for rest in cuts(n - k)]
    for grown in np.random.default_rng(0).integers(0, 12, (20, 10)):
        assert most(grown) == max(sum(grown[k] for k in cut) for n in range(10) for cut in cuts(n))


def test_what_is_refused():
    """An embedding table without room, and numbers out of range, each in one line."""
    assert extra(VOCABULARY, 64, modes=3, sentinels=24, owner="UL2") == (40, 64)
    with pytest.raises(
        UserError, match=r"UL2 needs 28 ids behind the vocabulary of 37 and the embedding table has 64 rows"
    ):
        extra(VOCABULARY, 64, modes=3, sentinels=25, owner="UL2")
    for make, key in [
        (lambda: SpanCorruption(density=1.0), r"SpanCorruption\.density"),
        (lambda: Denoiser(span=0.5), r"Denoiser\.span"),
        (lambda: CM3(most=-1), r"CM3\.most"),
        (lambda: UL2(shortest=1), r"UL2\.shortest"),
    ]:
        with pytest.raises(UserError, match=key):
            make()
    for objective in (UL2(), CM3()):
        shapes = dict.fromkeys((*objective.fields(), "loss_mask"), ((8, 12), np.int32))
        with pytest.raises(UserError, match="learns whole documents and the data has a loss_mask"):
            objective.check(steps=1, batch=shapes)
    assert len(MIXTURE) == 7
