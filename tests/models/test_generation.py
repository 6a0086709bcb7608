"""Generation over a cache: what full passes without one give, row by row, and when rows end."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from writing import VOCABULARY, WRITERS, full_passes, log_softmax, prompts, texts, writer

from models import Causal, Prefix
from models.decoding import Beam, Contrastive, Greedy, Prompts, Sampler, Stop, TopK, TrunkDecoder, generate, unrolled

T = 5
STOP = Stop(length=T, pad=VOCABULARY.pad)
STRATEGIES = {
    "greedy": Greedy(),
    "sampler": Sampler(temperature=0.8, filters=(TopK(k=4),)),
    "beam": Beam(beams=3),
    "contrastive": Contrastive(alpha=0.5, candidates=3),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def program(trunk, strategy=STRATEGIES["greedy"], stop=STOP, prefix=False):
    """Continuations on the host, from prompts and keys."""
    graph, state = nnx.split(trunk)
    run = jax.jit(lambda s, p, k: generate(TrunkDecoder(nnx.merge(graph, s), prefix), p, strategy, stop, k))
    return lambda given, keys: jax.device_get(run(state, given, keys))


def written(trunk, given, *how, **more):
    """Continuations by some keys."""
    return program(trunk, *how, **more)(given, jax.random.split(jax.random.key(5), len(given.tokens)))


@pytest.mark.parametrize("name", WRITERS)
def test_cached_equals_uncached(name):
    """Each row alone, without padding or cache, one full pass a token; and again with a block for every layer."""
    trunk, given = writer(name), prompts(3, 7, 1)
    found = written(trunk, given)
    passed = full_passes(trunk, 7 + T)
    for row, ids in enumerate(texts(given)):
        for t in range(T):
            logits = passed(ids)[1][-1]
            assert found.tokens[row, t] == logits.argmax()
            np.testing.assert_allclose(found.log_probability[row, t], log_softmax(logits).max(), atol=1e-9)
            ids.append(int(logits.argmax()))
    assert found.drawn.all()
    # Continuations that stand still would show little.
    assert len(np.unique(found.tokens)) > 3
    if name in ("windows", "llama"):
        apart = written(unrolled(trunk), given)
        np.testing.assert_array_equal(apart.tokens, found.tokens)
        np.testing.assert_allclose(apart.log_probability, found.log_probability, atol=1e-9)


@pytest.mark.parametrize("name", ["sampler", "beam", "contrastive"])
def test_a_row_knows_nothing_of_other_rows_padding_or_documents(name):
    """Among others, alone, behind more padding and behind another document in its row: the same continuation."""
    trunk, given = writer("windows"), prompts(3, 6, 2)
    keys = jax.random.split(jax.random.key(6), 3)
    run = program(trunk, STRATEGIES[name])
    together = run(given, keys)
    one = lambda tokens, segments: Prompts(jnp.asarray([tokens], jnp.int32), jnp.asarray([segments], jnp.int32))
    for row, ids in enumerate(texts(given)):
        size = len(ids)
        others = [
            one([*ids, *range(6, 15 - size)], [1] * size + [0] * (9 - size)),
            one([7, 9, *ids, *[8] * (7 - size)], [1, 1] + [2] * size + [0] * (7 - size)),
            one([11, 6, *ids, *[8] * (7 - size)], [1, 1] + [2] * size + [0] * (7 - size)),
        ]
        for other in others:
            alone = run(other, keys[row : row + 1])
            np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
            np.testing.assert_allclose(alone.log_probability[0], together.log_probability[row], atol=1e-9)


def test_a_prefix_is_read_in_both_directions():
    """The first token follows the logits of one pass under `Prefix`; of two documents the last is the prefix."""
    trunk = writer()
    given = Prompts(jnp.asarray([[7, 8, 9, 10, 11, 6]]), jnp.asarray([[1, 1, 2, 2, 2, 0]]))
    graph, state = nnx.split(trunk)

    @jax.jit
    def first(state):
        model, where = (
            nnx.merge(graph, state),
            {"segments": given.segments, "positions": jnp.asarray([[0, 1, 0, 1, 2, 0]])},
        )
        passes = [model(given.tokens, mask=mask, **where) for mask in (Prefix(given.segments == 2), Causal())]
        return [model.scores(out.hidden[0, 4]).logits() for out in passes]

    both, left = (log_softmax(np.asarray(logits)).max() for logits in first(state))
    np.testing.assert_allclose(written(trunk, given, prefix=True).log_probability[0, 0], both, atol=1e-9)
    assert abs(left - both) > 1e-3


class Counting(Greedy):
    """Greedy that tells how many tokens were chosen."""

    def result(self, stop, state):
        """The count."""
        return state.record.count


def test_rows_end():
    """Behind their first end token, each for itself; the loop ends with the last row."""
    trunk, given = writer(), prompts(3, 7, 1, 4)
    free = written(trunk, given, stop=Stop(length=9, pad=0)).tokens
    size = lambda row, ends: next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
    # Two tokens at which the rows end in different places.
    pairs = itertools.combinations(range(VOCABULARY.size), 2)
    ends = max(pairs, key=lambda pair: len({size(row, pair) for row in free}))
    sizes = np.array([size(row, ends) for row in free])
    assert len(set(sizes)) > 2
    stop = Stop(length=9, ends=ends, pad=0)
    found, here = written(trunk, given, stop=stop), np.arange(9) < sizes[:, None]
    np.testing.assert_array_equal(found.drawn, here)
    np.testing.assert_array_equal(found.tokens, np.where(here, free, 0))
    assert not found.log_probability[~here].any()
    first = Prompts(given.tokens[:1], given.segments[:1])
    assert written(trunk, first, Counting(), stop) == sizes[0]
    assert written(trunk, given, Counting(), stop) == max(sizes)


@pytest.mark.parametrize(
    "strategy",
    [
        Sampler(filters=(TopK(k=1),)),
        Beam(beams=1, penalty=0.0),
        Contrastive(alpha=0.0, candidates=4),
        Contrastive(candidates=1),
    ],
    ids=repr,
)
def test_what_is_greedy(strategy):
    """One candidate, one beam, no penalty for what is alike: rows end alike too."""
    trunk, given = writer(), prompts(3, 7, 1)
    end = int(written(trunk, given).tokens[0, 2])
    stop = Stop(length=T, ends=(end,), pad=0)
    greedy, found = written(trunk, given, stop=stop), written(trunk, given, strategy, stop)
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_array_equal(found.drawn, greedy.drawn)
    if not isinstance(strategy, Sampler):
        np.testing.assert_allclose(found.log_probability, greedy.log_probability, atol=1e-9)


def test_samples_are_drawn_from_full_passes():
    """The token is the best of the filtered, tempered logits with the noise of the row's key at that place."""
    trunk, given, heat = writer("llama"), prompts(3, 7), 3.0
    keys = jax.random.split(jax.random.key(7), 2)
    found = program(trunk, Sampler(temperature=heat, filters=(TopK(k=5),)))(given, keys)
    passed = full_passes(trunk, 7 + T)
    for row, ids in enumerate(texts(given)):
        for t in range(T):
            logits = passed(ids)[1][-1] / heat
            logits = np.where(logits >= np.sort(logits)[-5], logits, -np.inf)
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(keys[row], t), logits.shape))
            token = int((logits + noise).argmax())
            assert found.tokens[row, t] == token
            np.testing.assert_allclose(found.log_probability[row, t], log_softmax(logits)[token], atol=1e-9)
            ids.append(token)
    assert (found.tokens != written(trunk, given).tokens).any()


def test_frequencies_are_the_softmax():
    """Chi-squared over many keys, with and without a filter."""
    rows, heat = 4000, 5.0
    trunk = writer()
    given = Prompts(jnp.tile(jnp.asarray([[7, 9]]), (rows, 1)), jnp.ones((rows, 2), jnp.int32))
    logits = full_passes(trunk, 2)([7, 9])[1][-1] / heat
    for k in (VOCABULARY.size, 4):
        chances = np.exp(log_softmax(np.where(logits >= np.sort(logits)[-k], logits, -np.inf)))
        tokens = written(trunk, given, Sampler(temperature=heat, filters=(TopK(k=k),)), Stop(length=1)).tokens[:, 0]
        counts = np.bincount(tokens, minlength=VOCABULARY.size)
        assert not counts[chances == 0].any()
        inside = chances > 0
        wanted = rows * chances[inside]
        freedom = inside.sum() - 1
        assert wanted.min() > 5
        assert (np.square(counts[inside] - wanted) / wanted).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_a_trunk_is_left_as_it_is():
    """`unrolled` copies: leaves by layer are those of the stack, and the trunk still has its stack."""
    trunk = writer("windows")
    before = jax.tree.map(np.asarray, nnx.split(trunk)[1])
    other = unrolled(trunk)
    assert sorted(other.stack.layers, key=int) == [str(i) for i in range(5)]
    assert not other.stack.scanned
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.split(trunk)[1]))
    assert len(trunk.stack.scanned) == 2
