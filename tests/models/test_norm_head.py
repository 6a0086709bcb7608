"""NormHead against numpy: both axes, their gradients, rows that pad the table, a vocabulary cut over devices, decoding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Attention, Causal, NormHead, Trunk, Vocabulary
from models.decoding import Greedy, Prompts, Stop, TrunkDecoder, generate
from objectives.cross_entropy import cross_entropy
from partitioning import fsdp_tensor

V, D = 13, 8
VOCABULARY = Vocabulary(size=V, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
AXES = pytest.mark.parametrize("axis", ["token", "feature"])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def head(axis, table):
    """One with this table; rows past the vocabulary are huge."""
    made = NormHead(D, VOCABULARY, axis=axis, multiple=len(table), rngs=nnx.Rngs(0))
    made.table.set_value(table)
    return made


def inputs(rows):
    draw = np.random.default_rng(0)
    table = draw.standard_normal((V, D)) * draw.uniform(0.1, 5, (V, 1))
    table = np.concatenate([table, np.full((rows - V, D), 1e3)])
    hidden, targets = draw.standard_normal((4, 9, D)), draw.integers(0, V, (4, 9))
    weight = draw.random((4, 9))
    return tuple(map(jnp.asarray, (table, hidden, targets, weight)))


def loss(table, hidden, targets, weight, *, axis):
    return cross_entropy(head(axis, table)(hidden, None), targets, weight, tokens_per_chunk=8).total


def expected(table, hidden, targets, weight, *, axis, norms=None):
    """By hand, all at once; `norms` stand for those of the table where no gradient goes through them."""
    own = table[:V]
    norms = jnp.sqrt((own**2).sum(-1 if axis == "token" else 0, keepdims=True)) if norms is None else norms
    logits = hidden @ (own / (norms + 1e-7)).T
    return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * weight).sum()


@AXES
def test_scores_loss_and_gradients_are_those_of_the_formula(axis):
    """By token the gradient goes through the norm, by feature it does not; rows that pad count for nothing."""
    rest = inputs(16)[1:]
    norms = None if axis == "token" else jnp.sqrt((inputs(V)[0] ** 2).sum(0, keepdims=True))
    value, wanted = jax.value_and_grad(partial(expected, axis=axis, norms=norms), (0, 1))(inputs(V)[0], *rest)
    for rows in (V, 16):
        found, pulls = jax.jit(jax.value_and_grad(partial(loss, axis=axis), (0, 1)))(inputs(rows)[0], *rest)
        np.testing.assert_allclose(found, value, rtol=1e-12)
        np.testing.assert_allclose(pulls[0][:V], wanted[0], atol=1e-11)
        assert not np.any(pulls[0][V:])
        np.testing.assert_allclose(pulls[1], wanted[1], atol=1e-11)


@AXES
def test_vectors_have_length_one_whatever_the_table(axis):
    """A table whose vectors are longer or shorter scores alike; one of zeros scores 0, with finite gradients."""
    table, hidden, *_ = inputs(16)
    own = np.asarray(head(axis, table)(hidden, None).table)[:V]
    np.testing.assert_allclose(np.linalg.norm(own, axis=-1 if axis == "token" else 0), 1, rtol=1e-6)
    factors = jnp.arange(1.0, 17)[:, None] if axis == "token" else jnp.arange(1.0, D + 1)[None]
    logits = lambda table: head(axis, table)(hidden, None).logits()
    np.testing.assert_allclose(logits(factors * table), logits(table), atol=1e-5)
    none = table.at[3].set(0).at[:, 2].set(0)
    assert not np.any(logits(none)[..., 3])
    assert np.isfinite(jax.grad(lambda t: logits(t).sum())(none)).all()


@AXES
def test_eight_devices_are_one(axis):
    """The table cut by tokens and by features."""
    args = inputs(16)
    run = lambda *args: jax.jit(jax.value_and_grad(partial(loss, axis=axis), (0, 1)))(*args)
    value, pulls = run(*args)
    place = fsdp_tensor(2).place()
    with place.scope():
        cut = jax.device_put(args[0], place.parameter(("vocab", "embed"), args[0].shape, "table"))
        assert len({str(s.index) for s in cut.addressable_shards}) == 8
        found, others = run(cut, *args[1:])
    np.testing.assert_allclose(found, value, rtol=1e-12)
    for one, other in zip(pulls, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def test_decoding_takes_the_same_scores():
    """Token by token from a cache, what the whole text's scores say."""
    mixer = partial(Attention, heads=2)
    trunk = Trunk(VOCABULARY, width=D, layers=1, mixer=mixer, head=partial(NormHead, axis="feature"), rngs=nnx.Rngs(3))
    prompts = Prompts(jnp.asarray([[7, 9, 8]], jnp.int32), jnp.ones((1, 3), jnp.int32))
    wrote = generate(TrunkDecoder(trunk), prompts, Greedy(), Stop(length=4), jax.random.split(jax.random.key(0), 1))
    text = jnp.concatenate([prompts.tokens, wrote.tokens], axis=1)
    ones = jnp.ones(text.shape, jnp.int32)
    out = trunk(text, segments=ones, positions=jnp.cumsum(ones, 1) - 1, mask=Causal())
    best = np.asarray(trunk.scores(out.hidden).logits().argmax(-1))
    np.testing.assert_array_equal(best[:, 2:-1], wrote.tokens)
