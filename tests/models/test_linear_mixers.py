"""Mixers with one decay a head: beside numpy, in decoding, packed, padded, and what they refuse."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import (
    Attention,
    Bidirectional,
    Block,
    Causal,
    FeedForward,
    LightningAttention,
    Prefix,
    Retention,
    RMSNorm,
    Trunk,
    Vocabulary,
    Window,
    transnormer,
)
from models.block import Context
from models.decoding import Greedy, Prompts, Stop, TrunkDecoder, generate
from models.linear_attention.decays import RULES, alibi_slopes, log_decays
from models.linear_attention.lightning import turned
from models.positions import borders
from models.variables import flatten, replace_values
from partitioning import UserError

V, D, H, S = 61, 24, 4, 21
VOCABULARY = Vocabulary(size=V, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
MIXERS = {
    "transnormer": partial(LightningAttention, heads=H, layers=3, lrpe=True),
    "minimax": partial(
        LightningAttention, heads=H, layers=3, rule="minimax", value_activation=True, gate="sigmoid", norm=RMSNorm
    ),
    "retnet": partial(Retention, heads=H),
}


def loud(model, scale=12.0):
    """The same model with weights large enough to matter."""
    values = flatten(model, nnx.Param)
    replace_values(model, {n: x if n.endswith("scale") else scale * x for n, x in values.items()})
    return model


def trunk(name, **options):
    """Three layers of a mixer; the hybrid's last is softmax."""
    block = partial(Block, feed_forward=partial(FeedForward, hidden=32), norm=RMSNorm)
    linear = partial(block, mixer=MIXERS["transnormer" if name == "hybrid" else name])
    pattern = [linear, linear, partial(block, mixer=partial(Attention, heads=H))] if name == "hybrid" else [linear]
    made = Trunk(VOCABULARY, width=D, layers=3, pattern=pattern, rngs=nnx.Rngs(0), **options)
    return loud(made, 4.0)


NAMES = [*MIXERS, "hybrid"]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(6, V, (3, S)), jnp.int32)
# Row 0 whole, row 1 of two documents and padding, row 2 of three.
SEGMENTS = jnp.asarray([[1] * S, [1] * 8 + [2] * 9 + [0] * 4, [1] + [2] * 10 + [3] * 10], jnp.int32)
POSITIONS = jnp.asarray([[*range(S)], [*range(8), *range(9), 0, 0, 0, 0], [0, *range(10), *range(10)]], jnp.int32)


def states(model, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS, **rest):
    return model(tokens, segments=segments, positions=positions, mask=Causal(), **rest)


def silu(x):
    return x / (1 + np.exp(-x))


def by_hand(name, mixer, x, layer):
    """A mixer over one document, in float64, a token after another."""
    p = {key: np.asarray(value, np.float64) for key, value in flatten(mixer, nnx.Param).items()}
    q, k, v, gate = (np.einsum("sd,dhk->shk", x, p[key]) for key in ("query", "key", "value", "gate"))
    places = np.arange(len(x))[:, None, None]
    if name == "retnet":
        half = q.shape[-1] // 2
        angle = places * 10_000.0 ** (-np.arange(half) / half)
        spin = lambda x: np.concatenate(
            [
                x[..., :half] * np.cos(angle) - x[..., half:] * np.sin(angle),
                x[..., half:] * np.cos(angle) + x[..., :half] * np.sin(angle),
            ],
            -1,
        )
        q, k = spin(q), spin(k) / np.sqrt(q.shape[-1])
        decay = 1 - 2.0 ** (-5 - np.arange(H))
    else:
        q, k = silu(q), silu(k)
        slope = 2.0 ** (-8 * np.arange(1, H + 1) / H)
        decay = np.exp(-slope * (1 - layer / (2 + (1e-5 if name == "minimax" else 0)) + 1e-5))
    if name == "minimax":
        v = silu(v)
    if name == "transnormer":
        q, k = (np.concatenate([x * np.cos(p["theta"] * places), x * np.sin(p["theta"] * places)], -1) for x in (q, k))
    state, out = np.zeros((H, k.shape[-1], v.shape[-1])), []
    for t in range(len(x)):
        state = decay[:, None, None] * state + k[t][:, :, None] * v[t][:, None, :]
        read = np.einsum("hk,hkv->hv", q[t], state)
        axis = -1 if name == "retnet" else None
        read = read / np.sqrt((read**2).mean(axis, keepdims=axis is not None) + 1e-6)
        if name == "minimax":
            read = read * p["norm/scale"].reshape(H, -1)
        opened = {"retnet": silu, "minimax": lambda x: 1 / (1 + np.exp(-x)), "transnormer": lambda x: x}[name](gate[t])
        out.append(np.einsum("hv,hvd->d", opened * read, p["out"]))
    return np.stack(out)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_mixer_is_its_formula(name, layer):
    """In float64, to 1e-10."""
    with jax.enable_x64(True):
        mixer = loud(MIXERS[name](D, rngs=nnx.Rngs(0)))
        uneven = lambda x: x * (1 + jnp.arange(x.size) / x.size).reshape(x.shape)
        replace_values(mixer, {n: uneven(x) for n, x in flatten(mixer, nnx.Param).items() if n.endswith("scale")})
        x = np.random.default_rng(1).standard_normal((9, D))
        here = jnp.ones((1, 9), jnp.int32)
        context = Context(jnp.ones((1, 9, 9), bool), here, jnp.arange(9)[None], mask=Causal(), layer=layer)
        for _, leaf in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
            leaf.set_value(leaf.get_value().astype(jnp.float64))
        out, cache, taps = mixer(jnp.asarray(x)[None], context)
        assert (cache, taps) == (None, {})
        np.testing.assert_allclose(out[0], by_hand(name, mixer, x, layer), rtol=0, atol=1e-10 * np.abs(out).max())


def test_the_published_rules():
    """Numbers of each, computed apart, and what they disagree about."""
    rule = lambda name, **sizes: np.exp(np.asarray(log_decays(name, **sizes), np.float64))
    sizes = {"heads": 4, "layer": 1, "layers": 4}
    np.testing.assert_allclose(rule("paper", **sizes), np.exp(-np.array([2, 4, 6, 8]) * 0.75), rtol=1e-5)
    np.testing.assert_allclose(rule("fla", **sizes), np.exp(-np.array([0, 2, 4, 6]) * 0.75), rtol=1e-5)
    slopes = np.array([0.25, 0.0625, 0.015625, 0.00390625])
    np.testing.assert_allclose(rule("official", **sizes), np.exp(-slopes * (2 / 3 + 1e-5)), rtol=1e-6)
    np.testing.assert_allclose(rule("minimax", **sizes), np.exp(-slopes * (1 - 1 / 3.00001 + 1e-5)), rtol=1e-6)
    np.testing.assert_allclose(rule("retnet", **sizes), 1 - 1 / np.array([32, 64, 128, 256]), rtol=1e-6)
    # ALiBi's slopes for 6 heads: those of 4, then the first and third of 8.
    np.testing.assert_allclose(alibi_slopes(6), [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
    assert not np.allclose(rule("official", heads=6, layer=0, layers=4), rule("minimax", heads=6, layer=0, layers=4))
    last = {name: rule(name, heads=4, layer=3, layers=4) for name in RULES}
    assert all((d > 0).all() and (d <= 1).all() for d in last.values())
    assert rule("minimax", heads=4, layer=0, layers=1).shape == (4,)


def test_lrpe_knows_distances():
    """q . k is sum_c q_c k_c cos(theta_c (i - j)): the same wherever the pair stands."""
    draw = np.random.default_rng(3)
    q, k, theta = draw.standard_normal((5,)), draw.standard_normal((5,)), draw.random(5)
    as_float = lambda x: jnp.asarray(x, jnp.float32)

    def at(x, place):
        return np.asarray(turned(as_float(x)[None, None, None], jnp.asarray([[place]]), as_float(theta)[None]))[0, 0, 0]

    for i, j in ((4, 1), (9, 6), (3, 0)):
        np.testing.assert_allclose(at(q, i) @ at(k, j), (q * k * np.cos(3 * theta)).sum(), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_alone(name):
    """States of each document are those of the document in a row of its own, whatever stands before it or behind."""
    model = trunk(name)
    found = nnx.jit(states)(model).hidden
    run = nnx.jit(states)
    for row, begin, end in ((0, 0, S), (1, 0, 8), (1, 8, 17), (2, 1, 11), (2, 11, 21)):
        size = end - begin
        tokens = jnp.zeros((1, S), jnp.int32).at[0, :size].set(TOKENS[row, begin:end])
        segments = jnp.zeros((1, S), jnp.int32).at[0, :size].set(7)
        alone = run(model, tokens, segments, jnp.arange(S)[None]).hidden
        np.testing.assert_allclose(found[row, begin:end], alone[0, :size], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_calls_and_tokens_change_nothing(name):
    """A row read in two calls, or token by token, with the cache handed on; borders and padding fall anywhere."""
    model = trunk(name)
    step = nnx.jit(states)
    whole = step(model).hidden
    for cuts in ((0, 6, S), tuple(range(S + 1))):
        cache, parts = model.empty_cache(3, S), []
        for a, b in pairwise(cuts):
            out = step(model, TOKENS[:, a:b], SEGMENTS[:, a:b], POSITIONS[:, a:b], cache=cache)
            cache = out.cache
            parts.append(out.hidden)
        found = jnp.concatenate(parts, axis=1)
        np.testing.assert_allclose(found[SEGMENTS > 0], whole[SEGMENTS > 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_linear_trunk_keeps_a_state_and_nothing_else(name):
    """Room for tokens costs neither bytes nor a mask of them; one softmax layer needs both."""
    model, room = trunk(name), 4096
    one = jnp.ones((3, 1), jnp.int32)
    cache = model.empty_cache(3, room)
    run = nnx.jit(states).lower(model, one, one, one, cache=cache).compile().as_text()
    size = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache))
    grows = name == "hybrid"
    assert (size(cache) > size(model.empty_cache(3, 1)), f"{room}]" in run or f"{room}," in run) == (grows, grows)


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_reading_again(name):
    """Prompts of unequal length, the last document of each goes on: every token is the best after the text so far."""
    model = trunk(name)
    lengths = np.array([7, 3, 11])
    segments = np.where(np.arange(11) < lengths[:, None], np.array([[1], [1], [2]]), 0)
    segments[2, :4] = 1
    prompts = Prompts(TOKENS[:, :11], jnp.asarray(segments, jnp.int32))
    graph, state = nnx.split(model)
    keys = jax.random.split(jax.random.key(0), 3)
    run = jax.jit(lambda s: generate(TrunkDecoder(nnx.merge(graph, s)), prompts, Greedy(), Stop(length=6), keys).tokens)
    chosen = np.asarray(run(state))
    read = nnx.jit(lambda m, *x: m.scores(states(m, *x).hidden).logits())
    for row, length in enumerate(lengths):
        begin = 4 if row == 2 else 0
        text = [*np.asarray(TOKENS[row, begin:length]), *chosen[row]]
        tokens = jnp.zeros((1, 20), jnp.int32).at[0, : len(text)].set(jnp.asarray(text))
        here = (jnp.arange(20) < len(text)).astype(jnp.int32)[None]
        best = np.asarray(read(model, tokens, here, jnp.arange(20)[None])).argmax(-1)[0]
        first = length - begin - 1
        np.testing.assert_array_equal(best[first : first + 6], chosen[row])


@pytest.mark.parametrize("name", NAMES)
def test_scanned_rematerialised_and_at_some_slots(name):
    """The same states unscanned, under remat, and where only some slots are asked for."""
    whole = nnx.jit(states)(trunk(name)).hidden
    for options in ({"scan": False}, {"remat": "full"}):
        np.testing.assert_allclose(nnx.jit(states)(trunk(name, **options)).hidden, whole, rtol=0, atol=1e-5)
    at = jnp.asarray([[3, 20], [7, 8], [0, 12]])
    some = nnx.jit(partial(states, at=at))(trunk(name)).hidden
    np.testing.assert_allclose(some, jnp.take_along_axis(whole, at[..., None], axis=1), rtol=0, atol=1e-5)


def test_borders_are_seen_through_padding_and_calls():
    """A document goes on behind padding, and in the next call."""
    segments = jnp.asarray([[1, 1, 0, 1, 2, 0, 2, 3]])
    np.testing.assert_array_equal(borders(segments)[0], [1, 0, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(borders(segments, jnp.asarray([1]))[0], [0, 0, 0, 0, 1, 0, 0, 1])


def test_padding_between_tokens_is_no_token():
    """Of a document with holes, every state is that of the document without them."""
    model = trunk("transnormer")
    holes = jnp.asarray([[1, 1, 0, 0, 1, 1, 0, 1]])
    at = jnp.asarray([[0, 1, 0, 0, 2, 3, 0, 4]])
    tokens = jnp.asarray([[9, 8, 5, 5, 7, 6, 5, 11]])
    full = states(model, tokens, holes, at).hidden[holes > 0]
    dense = states(model, tokens[holes > 0][None], jnp.ones((1, 5), jnp.int32), jnp.arange(5)[None]).hidden[0]
    np.testing.assert_allclose(full, dense, rtol=0, atol=1e-5)


def test_bfloat16_has_a_float32_state():
    model = trunk("transnormer", dtype="bfloat16")
    cache = model.empty_cache(3, S)
    out = states(model, cache=cache)
    assert out.hidden.dtype == jnp.bfloat16
    assert {x["state"].dtype for x in out.cache["entries"].values()} == {jnp.dtype("float32")}
    assert jnp.isfinite(out.hidden).all()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (Bidirectional(), "cannot compute the mask Bidirectional: use the mask Causal"),
        (Window(4), "cannot compute the mask Window"),
        (Causal() & Window(4), "cannot compute the mask Window"),
        (Prefix(jnp.ones((3, S), bool)), "cannot compute the mask Prefix"),
    ],
)
def test_a_mask_that_no_state_has_is_refused(mask, says):
    with pytest.raises(UserError, match=says) as error:
        trunk("transnormer")(TOKENS, segments=SEGMENTS, positions=POSITIONS, mask=mask)
    assert len(str(error.value).splitlines()) == 1


def test_what_else_is_refused():
    with pytest.raises(UserError, match="cannot compute a bias on scores"):
        states(trunk("retnet"), bias=jnp.zeros((1, 1, S, S)))
    with pytest.raises(UserError, match="decay rule 'papers': expected one of paper, fla, official, minimax, retnet"):
        LightningAttention(D, heads=4, layers=2, rule="papers", rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="'official' divides by the layers before the last: with 1 layer use 'minimax'"):
        transnormer(VOCABULARY, width=D, layers=1, heads=H, hidden=8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="heads = 5 does not divide the width 24"):
        Retention(D, heads=5, rngs=nnx.Rngs(0))


def test_another_trunks_cache_is_refused():
    """Of another number of layers, and of another shape, before anything is computed."""
    small = {"width": D, "heads": H, "hidden": 8, "rngs": nnx.Rngs(0)}
    three, four = (transnormer(VOCABULARY, layers=n, **small) for n in (3, 4))
    with pytest.raises(UserError, match=r"the cache of scanned/1 has shapes .*\(2, .*expected .*\(3, "):
        states(four, cache=three.empty_cache(3, S))
    wide = Trunk(VOCABULARY, width=D, layers=3, mixer=partial(Retention, heads=2), rngs=nnx.Rngs(0))
    narrow = Trunk(VOCABULARY, width=D, layers=3, mixer=partial(Retention, heads=4), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="the cache of scanned/0 has shapes"):
        states(wide, cache=narrow.empty_cache(3, S))
    with pytest.raises(UserError, match="the cache has entries for scanned/0, this trunk for layers/0, scanned/1"):
        states(three, cache=wide.empty_cache(3, S))
