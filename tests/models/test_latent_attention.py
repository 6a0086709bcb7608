"""Latent attention: beside plain attention of the expanded heads, through its cache of latents, packed, on eight devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from writing import VOCABULARY

from models import (
    Bidirectional,
    Block,
    Causal,
    FeedForward,
    Head,
    LatentAttention,
    Prefix,
    RMSNorm,
    Trunk,
    Window,
    YarnScaling,
)
from models.attention import BACKENDS
from models.backends import cudnn, splash
from models.block import Context
from models.masks import Tokens, lower
from partitioning import UserError, fsdp_sequence, fsdp_tensor

D, S = 8, 12
YARN = YarnScaling(factor=8.0, longest=16)
KINDS = {
    "low rank": partial(LatentAttention, heads=4, query_rank=6, rank=4, plain=3, rotary=4, value_width=5, scaling=YARN),
    "full queries": partial(LatentAttention, heads=4, rank=4, plain=4, rotary=2, value_width=3),
}
EACH = pytest.mark.parametrize("kind", KINDS)
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0], [1] * 3 + [2] * 9])
POSITIONS = np.array([[*range(5), *range(6), 0], [*range(3), *range(9)]])
MASKS = {
    "causal": Causal(),
    "both ways": Bidirectional(),
    "window": Causal() & Window(2),
    "prefix": Prefix(jnp.asarray(POSITIONS < 2)),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def filled(made, seed=3):
    """With weights large enough that every token before moves the next."""
    graph, state = nnx.split(made)
    draw = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * draw.standard_normal(x.shape)), state))


def called(mixer, x, mask, **more):
    """The result of one call over packed rows."""
    segments, positions = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
    rows = Tokens(jnp.arange(S), segments, positions)
    where = Context(lower(mask, rows, rows), segments, positions, mask, causal=mask.causal, **more)
    graph, state = nnx.split(mixer)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, where))(state, jnp.asarray(x))


def turned(x, positions, scaling):
    """Rotary positions by complex numbers, and the factor of the scaling, which is left out."""
    half = x.shape[-1] // 2
    frequencies, factor = 10_000.0 ** (-np.arange(half) / half), 1.0
    if scaling is not None:
        frequencies, factor = (np.asarray(y) for y in scaling(jnp.asarray(frequencies), 10_000.0))
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions * frequencies)
    return np.concatenate([z.real, z.imag], -1), factor


def by_hand(mixer, x, row, sees):
    """One row, query by query and head by head, with every head's keys and values written out."""
    w = {"/".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(mixer))}
    rms = lambda y, scale: y / np.sqrt((y**2).mean() + 1e-6) * scale
    plain, heads = mixer.plain, w["query"].shape[1]
    out, scaling = np.zeros((S, D)), mixer.scaling
    for t in range(S):
        given = x[t] if mixer.query_latent is None else rms(x[t] @ w["query_latent"], w["query_norm/scale"])
        for h in range(heads):
            q = given @ w["query"][:, h]
            q[plain:], factor = turned(q[plain:], POSITIONS[row, t], scaling)
            scores, values = [], []
            for s in np.flatnonzero(sees[t]):
                c = rms(x[s] @ w["latent"], w["latent_norm/scale"])
                shared = turned(x[s] @ w["rotary_key"], POSITIONS[row, s], scaling)[0]
                scores.append(q @ np.concatenate([c @ w["key"][:, h], shared]) * factor**2 / np.sqrt(len(q)))
                values.append(c @ w["value"][:, h])
            if scores:
                p = np.exp(scores - np.max(scores))
                out[t] += (p / p.sum()) @ np.array(values) @ w["out"][h]
    return out


@EACH
@pytest.mark.parametrize("mask", MASKS)
def test_it_is_attention_of_the_expanded_heads(kind, mask):
    """In float64, every mask, packed rows; and the states of some slots are those of all."""
    mixer = filled(KINDS[kind](D, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).standard_normal((2, S, D))
    found, cache, taps = called(mixer, x, MASKS[mask], taps=("attention",))
    rows = Tokens(jnp.arange(S), jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
    sees = np.asarray(lower(MASKS[mask], rows, rows))
    assert cache is None
    np.testing.assert_allclose(np.asarray(taps["attention"].sum(-1))[:, 0], sees.any(-1), atol=1e-12)
    for row in range(2):
        np.testing.assert_allclose(found[row], by_hand(mixer, x[row], row, sees[row]), rtol=0, atol=1e-12)
    at = jnp.array([[9, 2], [0, 11]])
    some = called(mixer, x, MASKS[mask], at=at)[0]
    np.testing.assert_allclose(some, jnp.take_along_axis(found, at[..., None], axis=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cudnn", "splash"])
def test_back_ends_agree(backend, monkeypatch):
    """What runs on a GPU and on a TPU, with its stand-in on this machine; values of another width than the keys."""
    stand_in = {
        "cudnn": partial(cudnn.product, implementation="xla"),
        "splash": partial(splash.product, interpret=True),
    }
    if backend in stand_in:
        monkeypatch.setitem(BACKENDS, backend, stand_in[backend])
    x = np.random.default_rng(1).standard_normal((2, S, D)).astype(np.float32)
    make = lambda backend: filled(KINDS["low rank"](D, backend=backend, rngs=nnx.Rngs(0)))
    other, xla = (called(make(b), x, Causal())[0] for b in (backend, "xla"))
    np.testing.assert_allclose(other[SEGMENTS > 0], xla[SEGMENTS > 0], rtol=0, atol=2e-5)


def trunk(kind, layers=2):
    """A small decoder."""
    block = partial(Block, mixer=KINDS[kind], feed_forward=partial(FeedForward, hidden=8), norm=RMSNorm)
    make = partial(Trunk, VOCABULARY, width=D, layers=layers, pattern=[block], head=Head, vocab_multiple=8)
    return filled(make(dtype="float64", rngs=nnx.Rngs(0)))


def test_a_cache_of_latents_equals_one_call():
    """Packed documents read in pieces; a cache keeps rank + rotary numbers a token, and the second document is alone."""
    model = trunk("low rank", layers=1)
    graph, state = nnx.split(model)
    call = jax.jit(
        lambda tokens, segments, positions, cache: nnx.merge(graph, state)(
            tokens, segments=segments, positions=positions, mask=Causal(), cache=cache
        )
    )
    tokens = np.random.default_rng(0).integers(6, VOCABULARY.size, (2, S))
    inputs = [jnp.asarray(y, jnp.int32) for y in (tokens, SEGMENTS, POSITIONS)]
    whole = call(*inputs, None).hidden
    cache, start, found = model.empty_cache(2, S + 2), 0, []
    mixer = KINDS["low rank"].keywords
    assert {y.shape[-2:] for y in jax.tree.leaves(cache) if y.ndim > 2 and y.shape[-2] == S + 2} == {
        (S + 2, mixer["rank"] + mixer["rotary"])
    }
    for end in (7, 8, S):
        out = call(*(y[:, start:end] for y in inputs), cache)
        cache, start = out.cache, end
        found.append(out.hidden)
    here = SEGMENTS > 0
    np.testing.assert_allclose(jnp.concatenate(found, 1)[here], whole[here], rtol=0, atol=1e-11)
    other = inputs[0].at[SEGMENTS == 1].set(7)
    np.testing.assert_array_equal(call(other, *inputs[1:], None).hidden[SEGMENTS == 2], whole[SEGMENTS == 2])


@pytest.mark.parametrize("rules", [partial(fsdp_tensor, 2), partial(fsdp_sequence, 4)], ids=["heads", "length"])
def test_eight_devices_equal_one(rules):
    """Gradients, rows packed; heads cut, and rows cut along their length."""
    graph, state = nnx.split(trunk("low rank" if rules.func is fsdp_sequence else "full queries", layers=1))
    tokens = jnp.asarray(np.random.default_rng(2).integers(6, VOCABULARY.size, (8, S)), jnp.int32)
    segments = jnp.asarray(SEGMENTS[[0] * 8], jnp.int32)

    def loss(state, tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(S), tokens.shape)
        out = nnx.merge(graph, state)(tokens, segments=segments, positions=positions, mask=Causal()).hidden
        return (jnp.sin(out) * (1 + jnp.arange(out.size).reshape(out.shape) % 7)).sum()

    found = []
    for made, count in ((rules.func(1), 1), (rules(), 8)):
        place = made.place(jax.devices()[:count])
        rows = [jax.device_put(x, place.rows(x.shape, n)) for x, n in ((tokens, "tokens"), (segments, "segments"))]
        with place.scope():
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(state, *rows)))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-10 * max(1, np.abs(one).max()))


def test_what_is_refused():
    """One line each."""
    with pytest.raises(UserError, match=r"rotary = 3: expected an even number"):
        LatentAttention(D, rotary=3, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"value_width = 9: expected at most plain .* = 8"):
        LatentAttention(D, plain=4, rotary=4, value_width=9, backend="splash", rngs=nnx.Rngs(0))
    mixer = KINDS["low rank"](D, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="takes keys and values from its own states"):
        called(mixer, np.ones((2, S, D)), Causal(), source=jnp.ones((2, S, D)))
