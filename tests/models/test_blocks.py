"""What a block is made of: where its norms stand, and what attention does beside attending."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from awkward import VOCABULARY
from flax import nnx

from models import Attention, Block, Causal, Head, Llama3Scaling, RMSNorm, Trunk, YarnScaling
from models.backends.reference import reference_weights
from models.positions import rotate
from partitioning import UserError

WIDTH, LAYERS = 6, 3


def test_a_share_of_a_head_is_rotated():
    """The first features as if they were all, the others not at all; a share of 1 is the whole head."""
    draw = np.random.default_rng(0)
    x, positions = jnp.asarray(draw.standard_normal((1, 5, 2, 8)), jnp.float32), jnp.arange(5)[None]
    found = rotate(x, positions, 100.0, features=4)
    np.testing.assert_array_equal(found[..., :4], rotate(x[..., :4], positions, 100.0))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(rotate(x, positions, 100.0, features=8), rotate(x, positions, 100.0))
    with pytest.raises(UserError, match=r"rotary = 0\.4 turns 3 of the 8 features of a head: expected an even number"):
        Attention(8, heads=1, rotary=0.4, rngs=nnx.Rngs(0))


class Mixer(nnx.Module):
    """f(x) = sin(x)."""

    def __init__(self, width, *, rngs):
        del width, rngs

    def __call__(self, hidden, context):
        return jnp.sin(hidden), None, {}


class Feed(nnx.Module):
    """f(x) = x^2 - 1."""

    counts_tokens = False

    def __init__(self, width, *, rngs):
        del width, rngs

    def __call__(self, x, present):
        return x**2 - 1, {}


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


FUNCTIONS = (np.sin, lambda x: x**2 - 1)
FORMS = {
    "pre": lambda x, f, layer: x + f(rms(x)),
    "post": lambda x, f, layer: rms(x + f(x)),
    "sandwich": lambda x, f, layer: x + rms(f(rms(x))),
    "scaled": lambda x, f, layer: x + f(rms(x) / np.sqrt(layer)),
}


def trunk(*, head=(), pattern, scan=True, **options):
    block = lambda placement: partial(Block, mixer=Mixer, feed_forward=Feed, norm=RMSNorm, placement=placement)
    return Trunk(
        VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        head_blocks=[block(p) for p in head],
        pattern=[block(p) for p in pattern],
        final_norm=False,
        scan=scan,
        rngs=nnx.Rngs(0),
        **options,
    )


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("places", [["pre"], ["post"], ["sandwich"], ["scaled"], ["post", "pre", "pre"]], ids="+".join)
def test_norms_stand_where_the_formula_says(places, scan):
    """Three layers in numpy; the last case is Mix-LN, post below and pre above."""
    x = np.random.default_rng(0).standard_normal((2, 4, WIDTH)).astype(np.float32)
    made = (
        trunk(head=places[:1], pattern=places[1:2], scan=scan) if len(places) > 1 else trunk(pattern=places, scan=scan)
    )
    ones = np.ones((2, 4), np.int32)
    out = made(embeddings=jnp.asarray(x), segments=ones, positions=np.tile(np.arange(4), (2, 1))).hidden
    for layer in range(LAYERS):
        for f in FUNCTIONS:
            x = FORMS[places[min(layer, len(places) - 1)]](x, f, layer + 1)
    np.testing.assert_allclose(out, x, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_mix_ln_and_layer_norm_scaling_have_pre_and_post_as_ends(scan):
    """No post layers are Pre-LN, all of them Post-LN; scaled layer 1 is Pre-LN, and layers count from the stack's bottom."""
    x = np.random.default_rng(0).standard_normal((2, 4, WIDTH)).astype(np.float32)
    ones = np.ones((2, 4), np.int32)
    where = {"segments": ones, "positions": np.tile(np.arange(4), (2, 1))}
    run = lambda **made: np.asarray(
        trunk(scan=scan, **made)(embeddings=jnp.asarray(x), taps=["layers"], **where).taps["layers"]
    )
    pre, post = run(pattern=["pre"]), run(pattern=["post"])
    for alpha in (0, 1 / 3, 2 / 3, 1):
        first = int(alpha * LAYERS + 0.5)
        mixed = run(head=["post"] * first, pattern=["pre"])
        np.testing.assert_allclose(mixed[: first + 1], post[: first + 1], rtol=1e-6, atol=1e-6)
        if not first:
            np.testing.assert_allclose(mixed, pre, rtol=1e-6, atol=1e-6)
    scaled = run(pattern=["scaled"])
    np.testing.assert_allclose(scaled[:2], pre[:2], rtol=1e-6, atol=1e-6)
    assert np.abs(scaled[2] - pre[2]).max() > 1e-2
    behind = run(head=["scaled"], pattern=["scaled"])
    np.testing.assert_allclose(behind, scaled, rtol=1e-6, atol=1e-6)


def attend(layer, x):
    """A call over one document a row; the result and the weights."""
    rows, length = x.shape[:2]
    visible = np.broadcast_to(np.tri(length, dtype=bool), (rows, length, length))
    context = SimpleNamespace(
        source=None, at=None, visible=visible, bias=None, positions=np.tile(np.arange(length), (rows, 1)),
        cache=None, causal=True, segments=np.ones((rows, length)), mask=Causal(), taps=("attention",),
    )  # fmt: skip
    out, _, taps = layer(jnp.asarray(x), context)
    return np.asarray(out), np.asarray(taps["attention"])


def test_attention_by_hand():
    """Normalised queries and keys, a scale of its own, grouped heads, and a gate before the output."""
    layer = Attention(
        8, heads=4, kv_heads=2, head_width=6, scale=0.7, qk_norm=RMSNorm, output_gate=True, theta=50.0, rngs=nnx.Rngs(0)
    )
    draw = np.random.default_rng(1)
    for _, leaf in nnx.to_flat_state(nnx.state(layer)):
        leaf.set_value(jnp.asarray(draw.standard_normal(leaf.get_value().shape), jnp.float32))
    x = draw.standard_normal((2, 5, 8)).astype(np.float32)
    out, weights = attend(layer, x)

    value = lambda leaf: np.asarray(leaf.get_value())
    project = lambda leaf: np.einsum("bsd,dhk->bshk", x, value(leaf))
    q, k = (
        rms(project(layer.query)) * value(layer.query_norm.scale),
        rms(project(layer.key)) * value(layer.key_norm.scale),
    )

    def turned(y):
        pairs = y[..., :3] + 1j * y[..., 3:]
        angles = np.arange(5)[:, None] * 50.0 ** (-np.arange(3) / 3)
        pairs = pairs * np.exp(1j * angles)[None, :, None, :]
        return np.concatenate([pairs.real, pairs.imag], -1)

    q, k, v = turned(q), turned(k).repeat(2, axis=2), project(layer.value).repeat(2, axis=2)
    scores = np.where(np.tri(5, dtype=bool), 0.7 * np.einsum("bqhk,bshk->bhqs", q, k), -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    expected = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)
    mixed = np.einsum("bhqs,bshk->bqhk", expected, v) / (1 + np.exp(-project(layer.gate)))
    np.testing.assert_allclose(out, np.einsum("bqhk,hkd->bqd", mixed, value(layer.out)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaling", [Llama3Scaling(factor=1.0, longest=16), YarnScaling(factor=1.0, longest=16)])
def test_a_scaling_of_one_is_none(scaling):
    x = np.random.default_rng(0).standard_normal((1, 7, 2, 8)).astype(np.float32)
    positions = np.arange(7)[None]
    np.testing.assert_allclose(rotate(x, positions, 100.0, scaling), rotate(x, positions, 100.0), rtol=1e-6, atol=1e-6)


def test_types_are_added_and_an_untied_head_has_its_own_table():
    made = trunk(pattern=["pre"], types=2)
    tokens, positions = np.array([[7, 8, 9]]), np.array([[0, 1, 2]])
    kinds = np.array([[0, 1, 1]])
    table, types = np.asarray(made.table.get_value()), np.asarray(made.types.get_value())
    np.testing.assert_allclose(made.embed(tokens, positions, kinds), table[tokens] + types[kinds], rtol=1e-6)
    np.testing.assert_allclose(made.embed(tokens, positions), table[tokens] + types[0], rtol=1e-6)
    untied = Trunk(VOCABULARY, width=WIDTH, layers=0, head=Head, rngs=nnx.Rngs(0))
    hidden = np.ones((1, 1, WIDTH), np.float32)
    own = np.asarray(untied.head.table.get_value())[: VOCABULARY.size]
    np.testing.assert_allclose(untied.scores(hidden).logits()[0, 0], own.sum(1), rtol=1e-5, atol=1e-6)
    assert not np.allclose(own, np.asarray(untied.table.get_value())[: VOCABULARY.size])


def test_a_query_that_sees_nothing_has_no_weights():
    q = jnp.ones((1, 2, 1, 4))
    weights = reference_weights(q, q, jnp.array([[[True, False], [False, False]]]), None)
    np.testing.assert_array_equal(weights[0, 0], [[1, 0], [0, 0]])
