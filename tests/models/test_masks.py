"""Who moves whom: every mask, in training and in decoding, exactly; and the back ends agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from relations import (
    FORMS,
    INSIDE,
    KEY,
    MASKS,
    ORDER,
    PATTERNS,
    QUERY,
    RANDOM,
    ROWS,
    SAME,
    SEGMENTS,
    TOKENS,
    WHERE,
    D,
    S,
    call,
    closure,
    flat,
    joined,
    one_a_row,
    trunk,
)

from models import (
    ByRow,
    Causal,
    Chunk,
    Matrix,
    Permutation,
    Prefix,
    Sentinel,
    Window,
)
from models.masks import lower
from models.stack import layer_names, restack, unstack
from partitioning import UserError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_its_relation(name):
    """Lowered: the relation, the segment rule, nothing for padding; and `causal` and `mutual` are never claimed wrongly."""
    mask, relation = MASKS[name]
    np.testing.assert_array_equal(np.asarray(lower(mask, TOKENS, TOKENS))[0], relation & SAME)
    if mask.causal:
        assert not (relation & SAME)[KEY.repeat(S, 0) > QUERY.repeat(S, 1)].any()
    if mask.mutual:
        np.testing.assert_array_equal(relation & SAME, (relation & SAME).T)


def test_the_masks_that_a_recurrent_mixer_may_have():
    """`causal` sees through `&`, `|` and rows."""
    causal = {name for name, (mask, _) in MASKS.items() if mask.causal}
    assert causal == {"causal", "window behind", "causal & chunk"}
    choose = jnp.zeros(2, bool)
    assert ByRow(choose, Causal(), Window(3)).causal
    assert (Causal() | Window(3)).causal
    assert not ByRow(choose, Causal(), Chunk(3)).causal


def test_the_masks_under_which_experts_may_choose():
    """`mutual` likewise; a mask that is mutual by chance is not called so."""
    mutual = {name for name, (mask, _) in MASKS.items() if mask.mutual}
    assert mutual == {"encoder", "chunk", "sentinel", "window | sentinel"}
    choose = jnp.zeros(2, bool)
    assert ByRow(choose, Window(3, 3), Chunk(3)).mutual
    assert (Window(3, 3) | Chunk(3)).mutual
    assert not ByRow(choose, Chunk(3), Causal()).mutual
    assert not (Chunk(3) | Causal()).mutual


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_influence_is_exactly_what_the_masks_allow(backend, scan, pattern):
    """Forward and backward derivatives are exactly 0 where no path through the layers' masks leads, and nowhere else."""
    graph, state = trunk(pattern, backend, scan)
    draw = np.random.default_rng(2)
    x = jnp.asarray(draw.standard_normal((ROWS, S, D)))
    tangents = jnp.asarray(draw.standard_normal((S, D)))
    one_hot = lambda s: jnp.zeros((S, D)).at[s].set(tangents[s]) + jnp.zeros((ROWS, 1, 1))

    @jax.jit
    def influence(state, x):
        run = lambda x: call(graph, state, embeddings=x)
        forward = jax.vmap(lambda k: jax.jvp(run, (x,), (one_hot(k),))[1])(jnp.arange(S))
        out, back = jax.vjp(run, x)
        backward = jax.vmap(lambda q: back(one_hot(q))[0])(jnp.arange(S))
        return out, jnp.abs(forward).max(-1), jnp.abs(backward).max(-1)

    out, forward, backward = map(np.asarray, influence(state, x))
    assert all(np.isfinite(x).all() for x in (out, forward, backward))
    for row, (name, (_, relation)) in enumerate(MASKS.items()):
        reach = closure(pattern, relation)
        np.testing.assert_array_equal(forward[:, row].T != 0, reach, err_msg=f"{name}, forward")
        np.testing.assert_array_equal(backward[:, row] != 0, reach, err_msg=f"{name}, backward")


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_no_batch"])
def test_reference_and_xla_agree(remat):
    """Outputs and the gradients of all parameters, whatever is recomputed; head, repetitions and rest of a stack."""
    plain, plain_state = trunk("patterned", "reference", scan=False)
    scanned, scanned_state = trunk("patterned", "xla", remat=remat)
    grouped = restack(flat(plain_state), layer_names(flat(scanned_state)))
    leaves = nnx.to_flat_state(scanned_state)
    scanned_state = nnx.from_flat_state([(path, leaf.replace(grouped[joined(path)])) for path, leaf in leaves])
    tokens = jnp.asarray(np.random.default_rng(3).integers(6, 37, (ROWS, S)))
    pull = jnp.asarray(np.random.default_rng(4).standard_normal((ROWS, S, D)))

    def loss(graph):
        def value(state):
            hidden = call(graph, state, tokens=tokens)
            return (hidden * pull).sum(), hidden

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    (_, hidden), gradient = loss(plain)(plain_state)
    (_, same), other = loss(scanned)(scanned_state)
    np.testing.assert_allclose(same, hidden, rtol=0, atol=1e-12)
    gradient, other = flat(gradient), unstack(flat(other))
    assert gradient.keys() == other.keys()
    for name, value in gradient.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-11 * max(1, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_documents_of_a_row_do_not_move_each_other(form, backend):
    """Neither the other document's tokens nor what stands in padding, under any mask and feed-forward layer."""
    graph, state = trunk("patterned", backend, feed_forward=FORMS[form])
    draw = np.random.default_rng(5)
    tokens = draw.integers(6, 37, (ROWS, S))
    run = jax.jit(lambda tokens: call(graph, state, tokens=tokens))
    before = np.asarray(run(jnp.asarray(tokens)))
    for document in (1, 2, 0):
        changed = np.where(document == SEGMENTS, draw.integers(6, 37, (ROWS, S)), tokens)
        after = np.asarray(run(jnp.asarray(changed)))
        others = (document != SEGMENTS) & (SEGMENTS > 0)
        np.testing.assert_allclose(after[:, others], before[:, others], rtol=0, atol=1e-13)
        if document:
            assert np.abs(after - before)[:, document == SEGMENTS].max() > 1e-3


# Masks that a decoder may have; a prefix is read in one call.
DECODED = {
    "causal": Causal(),
    "window": Causal() & Window(2),
    "chunk": Causal() & Chunk(2),
    "sentinel": Causal() & (Sentinel(1) | Window(1)),
    "prefix": Prefix(jnp.asarray(INSIDE[None])),
}
DECODING = one_a_row(list(DECODED.values()))


def decoder(form="attention", pattern="patterned"):
    """A trunk with grouped queries or experts, and one full and one cached run over packed documents."""
    graph, state = trunk(pattern, feed_forward=FORMS[form])
    rows = len(DECODED)
    where = {name: value[:rows] for name, value in WHERE.items()}

    def full(tokens):
        return call(graph, state, mask=DECODING, where=where, tokens=tokens)

    def cached(tokens):
        model = nnx.merge(graph, state)

        def part(start, stop):
            return {name: value[:, start:stop] for name, value in ({"tokens": tokens} | where).items()}

        out = model(**part(0, 3), mask=DECODING, cache=model.empty_cache(rows, S))
        hidden, cache = [out.hidden], out.cache
        for t in range(3, S):
            out = model(**part(t, t + 1), mask=DECODING, cache=cache)
            hidden.append(out.hidden)
            cache = out.cache
        return jnp.concatenate(hidden, axis=1)

    return full, cached


@pytest.mark.parametrize("form", ["attention", "blocks"])
def test_cached_decoding_is_the_full_forward_pass(form, monkeypatch):
    """Token by token behind a prompt, packed documents and padding included; document 2 unmoved by document 1."""
    # A window that looks ahead cannot be decoded: in the pattern it is causal here.
    monkeypatch.setitem(PATTERNS, "patterned", [Window(2), None])
    full, cached = decoder(form)
    draw = np.random.default_rng(6)
    tokens = draw.integers(6, 37, (len(DECODED), S))
    cached = jax.jit(cached)
    whole, stepwise = np.asarray(jax.jit(full)(jnp.asarray(tokens))), np.asarray(cached(jnp.asarray(tokens)))
    np.testing.assert_allclose(stepwise, whole, rtol=0, atol=1e-12)
    changed = np.where(SEGMENTS == 1, draw.integers(6, 37, tokens.shape), tokens)
    again = np.asarray(cached(jnp.asarray(changed)))
    np.testing.assert_allclose(again[:, SEGMENTS == 2], stepwise[:, SEGMENTS == 2], rtol=0, atol=1e-13)
    assert np.abs(again - stepwise)[:, SEGMENTS == 1].max() > 1e-3


@pytest.mark.parametrize("mask", [Permutation(jnp.asarray(ORDER[None])), Matrix(jnp.asarray(RANDOM[None]))])
def test_a_mask_that_does_not_fit_a_cache_is_refused_by_name(mask):
    """A relation over the tokens of one call says nothing about tokens that came before."""
    graph, state = trunk()
    model = nnx.merge(graph, state)
    where = {name: value[:1, :1] for name, value in WHERE.items()}
    with pytest.raises(UserError, match=f"{type(mask).__name__}.*1 queries and {2 * S} keys"):
        model(jnp.full((1, 1), 7), **where, mask=mask, cache=model.empty_cache(1, 2 * S))


@pytest.mark.parametrize("wrong", [lambda: Window(-1), lambda: Chunk(0), lambda: Sentinel(-1)])
def test_sizes_out_of_range(wrong):
    """Refused where the mask is made."""
    with pytest.raises(UserError, match="at least"):
        wrong()
