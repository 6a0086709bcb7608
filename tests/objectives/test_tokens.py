"""What token objectives are made of: cross-entropy in chunks, selections, replacements, draws."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import VOCABULARY, plain_batch

from models import Scores
from objectives import MaskedLM, RandomTokens, Replace, TokenLoss
from objectives.cross_entropy import cross_entropy, log_probabilities
from objectives.draws import draws
from objectives.select import Selection
from objectives.token_loss import shifted
from partitioning import UserError, data

B, K, D, V, PADDED = 3, 7, 5, 11, 16
KEY = draws(jax.random.key(5), 2, jnp.arange(16), 16)


@pytest.fixture
def float64():
    """Identities to rounding."""
    with jax.enable_x64(True):
        yield


def example(bias: bool, padded: bool):
    """Hidden states, a table, a bias, targets and weights, some 0."""
    draw = np.random.default_rng(0)
    rows = PADDED if padded else V
    leaves = {"hidden": draw.standard_normal((B, K, D)), "table": draw.standard_normal((rows, D))}
    if bias:
        leaves["bias"] = draw.standard_normal(rows)
    weight = draw.random((B, K)) * (draw.random((B, K)) < 0.7)
    return jax.tree.map(jnp.asarray, (leaves, draw.integers(0, V, (B, K)), weight))


def naive(leaves, targets, *, smoothing=0.0, z=0.0):
    """The loss of each target from all logits at once."""
    logits = (leaves["hidden"] @ leaves["table"].T + leaves.get("bias", 0.0))[..., :V]
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return norm - (1 - smoothing) * picked - smoothing * logits.mean(-1) + z * norm**2


def scores(leaves):
    """The scores that are not multiplied out."""
    return Scores(leaves["hidden"], leaves["table"], leaves.get("bias"), V)


@pytest.mark.parametrize("tokens_per_chunk", [1, 6, 1000])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.01)])
@pytest.mark.parametrize(("bias", "padded"), [(False, True), (True, False), (True, True)])
def test_cross_entropy_in_chunks_is_the_naive_form(float64, bias, padded, smoothing, z, tokens_per_chunk):
    """Value, each target's loss, hits, and the gradients of states, table and bias."""
    leaves, targets, weight = example(bias, padded)
    how = {"smoothing": smoothing, "z": z}

    def ours(leaves):
        out = cross_entropy(scores(leaves), targets, weight, tokens_per_chunk=tokens_per_chunk, **how)
        return 3.0 * out.total, out

    def theirs(leaves):
        each = naive(leaves, targets, **how)
        return 3.0 * (each * weight).sum(), each

    (total, out), gradient = jax.value_and_grad(ours, has_aux=True)(leaves)
    (expected, each), other = jax.value_and_grad(theirs, has_aux=True)(leaves)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    np.testing.assert_allclose(out.each, each, rtol=1e-12)
    best = jnp.argmax((leaves["hidden"] @ leaves["table"].T + leaves.get("bias", 0.0))[..., :V], axis=-1)
    np.testing.assert_array_equal(out.hit, best == targets)
    for name in leaves:
        np.testing.assert_allclose(gradient[name], other[name], rtol=1e-10, atol=1e-13, err_msg=name)
    np.testing.assert_allclose(cross_entropy(scores(leaves), targets, weight, **how).total, out.total, rtol=1e-12)


@pytest.mark.parametrize("tokens_per_chunk", [1, 6, 1000])
def test_log_probabilities_have_each_target_its_gradient(float64, tokens_per_chunk):
    """Any function of them differentiates as that of the naive form."""
    leaves, targets, weight = example(True, True)
    ours = lambda x: (jnp.exp(log_probabilities(scores(x), targets, tokens_per_chunk=tokens_per_chunk)) * weight).sum()
    theirs = lambda x: (jnp.exp(-naive(x, targets)) * weight).sum()
    value, gradient = jax.value_and_grad(ours)(leaves)
    expected, other = jax.value_and_grad(theirs)(leaves)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in leaves:
        np.testing.assert_allclose(gradient[name], other[name], rtol=1e-10, atol=1e-13, err_msg=name)


def test_short_types_are_summed_in_float32():
    """The scores of bfloat16 states are not rounded to bfloat16."""
    leaves, targets, weight = example(False, True)
    short = jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves)
    total = cross_entropy(scores(short), targets, weight.astype(jnp.float32)).total
    assert total.dtype == jnp.float32
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), short)
    np.testing.assert_allclose(total, (naive(exact, targets) * weight).sum(), rtol=1e-5)


def test_next_tokens_are_of_the_same_document():
    """Targets, and weights that end with a document and follow the target's `loss_mask`."""
    batch = {
        "tokens": jnp.asarray([[7, 8, 9, 7, 8, 0]]),
        "segments": jnp.asarray([[1, 1, 1, 2, 2, 0]]),
        "loss_mask": jnp.asarray([[0, 0, 1, 1, 1, 1]]),
    }
    targets, weight = shifted(batch)
    np.testing.assert_array_equal(targets[0, :5], [8, 9, 7, 8, 0])
    np.testing.assert_array_equal(weight, [[0, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(shifted({k: batch[k] for k in ("tokens", "segments")})[1], [[1, 1, 0, 1, 0, 0]])


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5, 1.0, lambda step: 0.4 - 0.1 * step])
def test_random_tokens_selects_exactly_its_share_of_ordinary_tokens(rate):
    """Never a special, never padding, never twice, and all with one chance."""
    select = RandomTokens(rate=rate, most=0.6 if callable(rate) else None)
    batch = {name: jnp.asarray(value) for name, value in plain_batch(rows=16).items()}
    eligible = np.asarray((batch["segments"] > 0) & ~VOCABULARY.is_special(batch["tokens"]))
    chosen = select(batch, VOCABULARY, step=2, key=KEY)
    now = rate(2) if callable(rate) else rate
    np.testing.assert_array_equal(chosen.weight.sum(1), np.round(now * eligible.sum(1)))
    hidden = np.asarray(chosen.hidden(batch["tokens"].shape[1]))
    np.testing.assert_array_equal(hidden.sum(1), chosen.weight.sum(1))
    assert not (hidden & ~eligible).any()
    places = np.where(chosen.weight > 0, chosen.positions, 10**6)
    assert (np.diff(places, axis=1) >= 0).all()


def test_random_tokens_is_uniform():
    """Every ordinary token of a row is chosen equally often."""
    rows = 4096
    batch = {"tokens": jnp.full((rows, 6), 9).at[:, 0].set(VOCABULARY.bos), "segments": jnp.ones((rows, 6), jnp.int32)}
    key = draws(jax.random.key(0), 0, jnp.arange(rows), rows)
    chosen = RandomTokens(rate=0.4)(batch, VOCABULARY, step=0, key=key)
    share = np.asarray(chosen.hidden(6)).mean(0)
    assert share[0] == 0
    np.testing.assert_allclose(share[1:], 0.4, atol=4 * np.sqrt(0.24 / rows))


def test_a_selection_with_too_few_places_is_never_quiet():
    """A schedule needs `most`, and must keep to it at every step; what slips through is NaN, which the guard sees."""
    with pytest.raises(UserError, match=r"RandomTokens\.most: required"):
        RandomTokens(rate=lambda step: 0.2).check(10)
    rising = RandomTokens(rate=lambda step: 0.1 * step, most=0.45)
    rising.check(5)
    with pytest.raises(UserError, match=r"from 0 to 0\.5: it must stay in \[0, most = 0\.45\]"):
        rising.check(6)
    with pytest.raises(UserError, match="most"):
        MaskedLM(select=rising).check(steps=9, batch=dict.fromkeys(("tokens", "segments", "positions")))
    batch = {"tokens": jnp.full((2, 8), 9), "segments": jnp.ones((2, 8), jnp.int32)}
    key = draws(jax.random.key(0), 0, jnp.arange(2), 2)
    assert np.isnan(rising(batch, VOCABULARY, step=8, key=key).weight).all()


def test_replacements_come_with_their_frequencies():
    """Mask, a random ordinary token, or the old one; what is not selected stays."""
    rows, length = 2048, 16
    tokens = jnp.full((rows, length), 9)
    positions = jnp.tile(jnp.arange(0, length, 2), (rows, 1))
    weight = jnp.ones(positions.shape).at[:, -1].set(0)
    key = draws(jax.random.key(0), 0, jnp.arange(rows), rows)
    new = np.asarray(Replace(mask=0.6, random=0.3)(tokens, Selection(positions, weight), VOCABULARY, key=key))
    assert (new[:, 1::2] == 9).all()
    assert (new[:, 14] == 9).all()
    seen = new[:, 0:14:2]
    counts = np.bincount(seen.ravel(), minlength=VOCABULARY.size) / seen.size
    assert counts[[s for s in VOCABULARY.specials if s != VOCABULARY.mask]].sum() == 0
    assert counts[VOCABULARY.mask] == pytest.approx(0.6, abs=0.015)
    ordinary = VOCABULARY.size - len(VOCABULARY.specials)
    assert counts[9] == pytest.approx(0.1 + 0.3 / ordinary, abs=0.01)
    others = [t for t in range(6, VOCABULARY.size) if t != 9]
    np.testing.assert_allclose(counts[others], 0.3 / ordinary, atol=0.004)
    with pytest.raises(UserError, match="sum to at most 1"):
        Replace(mask=0.8, random=0.3)


def test_draws_belong_to_rows():
    """A key follows its row into any micro-batch, chunk or shard; names, steps and seeds have keys of their own."""
    words = lambda key: jax.random.key_data(key)
    whole = words(KEY("mask"))
    part = replace(KEY, rows=KEY.rows[1::4])
    np.testing.assert_array_equal(words(part("mask")), whole[1::4])
    np.testing.assert_array_equal(words(KEY.chunk(KEY.rows[3:5])("mask")), whole[3:5])
    np.testing.assert_array_equal(words(part.batch("time")), words(KEY.batch("time")))
    spread = words(KEY.spread(3)("mask"))
    np.testing.assert_array_equal(words(part.spread(3)("mask")), spread.reshape(16, 3, -1)[1::4].reshape(12, -1))
    assert len(np.unique(spread, axis=0)) == 48
    with data().place().scope():
        rows = jax.device_put(jnp.arange(16), data().place().rows((16,), "row"))
        sharded = jax.jit(lambda rows: words(draws(jax.random.key(5), 2, rows, 16)("mask")))(rows)
    np.testing.assert_array_equal(sharded, whole)
    others = [words(KEY("other")), words(draws(jax.random.key(5), 3, KEY.rows, 16)("mask"))]
    others.append(words(draws(jax.random.key(6), 2, KEY.rows, 16)("mask")))
    for other in others:
        assert not (other == whole).all(1).any()


@pytest.mark.parametrize("wrong", [{"smoothing": 1.5}, {"z": -0.1}, {"tokens_per_chunk": 0}])
def test_values_out_of_range(wrong):
    """Refused where the loss is made."""
    with pytest.raises(UserError, match=f"TokenLoss.{next(iter(wrong))}"):
        TokenLoss(**wrong)
