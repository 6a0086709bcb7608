"""The chunked forms of linear attention beside the recurrence: outputs, every gradient, the last state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_inputs import inputs, ordered, piece

from models.linear_attention.decayed import decayed
from models.linear_attention.delta import delta, unit_lower_inverse
from models.linear_attention.gated import gated
from models.linear_attention.recurrence import delta_recurrence, recurrence

DECAYED = (decayed, lambda q, k, v, g, *rest: recurrence(q, k, v, g[..., None], *rest))
# Each chunked form, and the recurrence that it is a form of.
FORMS = {
    "decayed": DECAYED,
    "steady": DECAYED,
    "gated": (gated, recurrence),
    "delta": (delta, delta_recurrence),
}


def results(form, parts, resets, state, seed=1):
    """Outputs and last state, and the gradients of a random sum of both by every input."""
    draw = np.random.default_rng(seed)
    out, last = jax.eval_shape(form, *ordered(parts), resets, state)
    one, other = (jnp.asarray(draw.standard_normal(x.shape), x.dtype) for x in (out, last))

    def total(parts, state):
        out, last = form(*ordered(parts), resets, state)
        return (out * one).sum() + (last * other).sum(), (out, last)

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(parts, state)
    return {"out": values[0], "last": values[1], "state": gradients[1], **gradients[0]}


def worst(found, right):
    """The largest error of each, relative to the largest entry."""
    return {name: float(np.abs(found[name] - x).max() / max(np.abs(x).max(), 1e-12)) for name, x in right.items()}


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 63, 64)), 65, 1000])
def test_outputs_gradients_and_state_are_the_recurrences(name, length):
    """In float64, packed with random borders, at any length."""
    form, step = FORMS[name]
    given = inputs(name, 2, length)
    assert max(worst(results(form, *given), results(step, *given)).values()) < 1e-12


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("strength", [0.0, 30.0, 1e4, np.inf])
def test_no_decay_and_the_strongest(name, strength):
    """All is kept, or next to nothing, or a gate is shut; everything stays finite."""
    form, step = FORMS[name]
    parts, resets, state = inputs(name, 1, 70)
    decay = parts["log_decay"]
    parts["log_decay"] = jnp.where(decay < -0.5, -strength, 0) if strength == np.inf else strength * decay
    found, right = results(form, parts, resets, state), results(step, parts, resets, state)
    assert all(np.isfinite(x).all() for x in found.values())
    errors = worst(found, right)
    if strength == np.inf:
        # The recurrence's own gradient by a shut gate is 0, as is the chunked one's.
        assert not found["log_decay"][decay < -0.5].any()
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.usefixtures("_float64")
@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMS)),
    length=st.integers(1, 40),
    chunk=st.sampled_from([1, 3, 8, 16]),
    chunks=st.sampled_from([1, 2, 5]),
    cut=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_chunks_and_calls_change_nothing(name, length, chunk, chunks, cut, seed):
    """Whatever the chunks, and also in two calls with the state handed on."""
    form, step = FORMS[name]
    cut = min(cut, length)

    @jax.jit
    def all_ways(parts, resets, state):
        first, outs = state, []
        for here in (slice(0, cut), slice(cut, length)):
            if here.start < here.stop:
                given = ordered(piece(parts, here))
                out, state = form(*given, resets[:, here], state, chunk=chunk, chunks=chunks)
                outs.append(out)
        whole = form(*ordered(parts), resets, first, chunk=chunk, chunks=chunks)
        return step(*ordered(parts), resets, first), whole, (jnp.concatenate(outs, axis=1), state)

    right, *others = all_ways(*inputs(name, 1, length, seed=seed))
    for found in others:
        for one, other in zip(found, right, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", FORMS)
def test_the_second_document_does_not_see_the_first(name):
    """Nor the state that came in: outputs and last state are those of the document alone."""
    form, _ = FORMS[name]
    parts, _, state = inputs(name, 1, 50)
    resets = jnp.arange(50)[None] == 21
    out, last = form(*ordered(parts), resets, state)
    alone = piece(parts, slice(21, None))
    expected = form(*ordered(alone), resets[:, 21:], jnp.zeros_like(state))
    np.testing.assert_allclose(out[:, 21:], expected[0], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(last, expected[1], rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", ["decayed", "steady"])
def test_tokens_that_are_not_there_decay_nothing(name):
    """Outputs of the others, every gradient and the last state are those of the row without them, wherever they stand."""
    parts, resets, state = inputs(name, 1, 60, strength=0.3)
    there = np.random.default_rng(5).random(60) < 0.7
    resets = resets & there
    given = {**parts, "k": jnp.where(there[:, None, None], parts["k"], 0)}
    all_of = lambda g: decayed(*ordered(given | {"log_decay": g}), resets, state, jnp.asarray(there)[None], chunk=8)
    few = piece(parts, there)
    some_of = lambda g: DECAYED[1](*ordered(few | {"log_decay": g}), resets[:, there], state)
    slopes = []
    for run, pick, g in ((all_of, there, given["log_decay"]), (some_of, slice(None), few["log_decay"])):
        total = lambda g, run=run, pick=pick: (lambda out, last: jnp.sin(out[:, pick]).sum() + last.sum())(*run(g))
        slopes.append(jax.grad(total)(g))
    (out, last), right = all_of(given["log_decay"]), some_of(few["log_decay"])
    np.testing.assert_allclose(out[:, there], right[0], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(last, right[1], rtol=1e-11, atol=1e-13)
    slope = slopes[0] if name == "steady" else slopes[0][:, there]
    np.testing.assert_allclose(slope, slopes[1], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_a_gradient_by_finite_differences():
    """The gated delta rule's, along a random direction."""
    parts, resets, state = inputs("delta", 1, 9)
    total = lambda t: sum(
        x.sum()
        for x in delta(*ordered({key: value + t * turn[key] for key, value in parts.items()}), resets, state, chunk=4)
    )
    draw = np.random.default_rng(3)
    turn = {key: jnp.asarray(draw.standard_normal(value.shape)) for key, value in parts.items()}
    slope, step = jax.jit(jax.grad(total))(0.0), 1e-5
    by_difference = (total(step) - total(-step)) / (2 * step)
    np.testing.assert_allclose(slope, by_difference, rtol=1e-7)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("strength", [0.05, 5.0])
def test_float32_is_as_exact_as_the_recurrence(name, strength):
    """Errors against float64 are at most twice those of the recurrence in float32, in every result."""
    form, step = FORMS[name]
    found, plain = {}, {}
    # One decay's gradient is a single number a head, whose error is luck: three draws.
    for seed in range(3):
        with jax.enable_x64(True):
            parts, resets, state = inputs(name, 2, 300, strength=strength, K=16, seed=seed)
            parts, state = jax.tree.map(lambda x: x.astype(jnp.float32), (parts, state))
            wide = jax.tree.map(lambda x: x.astype(jnp.float64), (parts, state))
            right = results(step, wide[0], resets, wide[1])
        for run, errors in ((form, found), (step, plain)):
            for n, x in results(run, parts, resets, state).items():
                errors[n] = errors.get(n, 0) + float(np.mean((np.float64(x) - right[n]) ** 2))
    assert all(found[n] <= 2**2 * plain[n] for n in found), {n: (found[n] / plain[n]) ** 0.5 for n in found}


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_has_a_float32_state(name):
    """Outputs are as near to float32's as bfloat16 allows, over a long text that keeps everything."""
    form, _ = FORMS[name]
    parts, resets, state = inputs(name, 1, 600, strength=0.01, dtype=np.float32)
    low = {key: value if key in ("log_decay", "rate") else value.astype(jnp.bfloat16) for key, value in parts.items()}
    exact = {key: value.astype(jnp.float32) for key, value in low.items()}
    out, last = jax.jit(form)(*ordered(low), resets, state)
    right = jax.jit(form)(*ordered(exact), resets, state)
    assert (out.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    scale = float(np.abs(right[0]).max())
    assert np.abs(np.float32(out) - right[0]).max() < 0.01 * scale
    assert np.abs(last - right[1]).max() < 0.01 * float(np.abs(right[1]).max())


def test_an_inverse_of_like_keys():
    """It holds where a series in powers would not."""
    draw = np.random.default_rng(0)
    alike = jnp.tril(jnp.ones((32, 32), jnp.float32), -1)
    np.testing.assert_array_equal(unit_lower_inverse(alike), np.eye(32) - np.eye(32, k=-1))
    odd = jnp.asarray(np.tril(draw.standard_normal((7, 7)), -1), jnp.float32)
    np.testing.assert_allclose(unit_lower_inverse(odd) @ (np.eye(7) + odd), np.eye(7), atol=1e-4)
