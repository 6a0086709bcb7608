"""A trunk of LayerNorms and the trunk of RMSNorms that it is folded to compute the same."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from awkward import VOCABULARY
from flax import nnx
from relations import POSITIONS, SEGMENTS, S

from models import (
    Attention,
    Block,
    Causal,
    Experts,
    FeedForward,
    Head,
    LayerNorm,
    LearnedPositions,
    NoNorm,
    NormHead,
    RMSNorm,
    TiedHead,
    Trunk,
    Window,
    fold_layer_norm,
)
from models.variables import flatten
from partitioning import UserError

WIDTH = 8
PLAIN = partial(
    Block,
    mixer=partial(Attention, heads=2, bias=True, qk_norm=LayerNorm, output_gate=True),
    feed_forward=partial(FeedForward, hidden=12, bias=True, gated=True),
    norm=LayerNorm,
)
EXPERTS = partial(
    Block,
    mixer=partial(Attention, heads=4, kv_heads=2),
    feed_forward=partial(Experts, experts=3, hidden=4),
    norm=partial(LayerNorm, bias=False, eps=1e-3),
    mask=Window(2),
    placement="scaled",
)


def trunk(**options):
    """Every kind of weight that adds to the residual stream, all of them random."""
    options = {
        "pattern": [PLAIN, EXPERTS],
        "norm": LayerNorm,
        "positions": partial(LearnedPositions, longest=11, offset=1),
    } | options
    made = Trunk(
        VOCABULARY,
        width=WIDTH,
        layers=options.pop("layers", 5),
        types=2,
        embedding_scale=True,
        dtype="float64",
        rngs=nnx.Rngs(0),
        **options,
    )
    draw = np.random.default_rng(0)
    for _, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        leaf.set_value(jnp.asarray(0.3 + 0.5 * draw.standard_normal(leaf.get_value().shape)))
    return made


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def call(made, **options):
    draw = np.random.default_rng(1)
    tokens, types = draw.integers(6, 37, (2, S)), draw.integers(0, 2, (2, S))
    tile = lambda x: jnp.asarray(np.tile(x, (2, 1)))
    where = {"segments": tile(SEGMENTS), "positions": tile(POSITIONS)}
    out = jax.jit(lambda: made(jnp.asarray(tokens), types=jnp.asarray(types), mask=Causal(), **where, **options))()
    return out, made.scores(out.hidden).logits()


@pytest.mark.parametrize(("head", "scan"), [(TiedHead, True), (TiedHead, False), (Head, True), (NormHead, False)])
def test_the_same_function(head, scan):
    """Final states and scores; between the layers the states are the old ones, centred."""
    made = trunk(head=head, scan=scan)
    before = jax.tree.map(np.array, flatten(made, nnx.Param))
    folded = fold_layer_norm(made)
    (out, logits), (same, same_logits) = call(made, taps=("layers",)), call(folded, taps=("layers",))
    np.testing.assert_allclose(same.hidden, out.hidden, rtol=0, atol=1e-12)
    np.testing.assert_allclose(same_logits, logits, rtol=0, atol=1e-11)
    layers = np.asarray(out.taps["layers"])
    np.testing.assert_allclose(same.taps["layers"], layers - layers.mean(-1, keepdims=True), rtol=0, atol=1e-12)
    assert np.abs(layers.mean(-1)).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, flatten(made, nnx.Param), before)


def test_a_config_of_rms_norms_holds_the_result():
    """The names and shapes of its weights are those of a trunk that is built with RMSNorm and a head of its own."""
    root = partial(RMSNorm, bias=True)
    blocks = [partial(PLAIN, norm=root), partial(EXPERTS, norm=partial(RMSNorm, eps=1e-3))]
    made = trunk(pattern=blocks, norm=root, head=Head)
    folded = fold_layer_norm(trunk())
    shapes = lambda made: {name: value.shape for name, value in flatten(made, nnx.Param).items()}
    assert shapes(folded) == shapes(made)
    graph, state = nnx.split(made)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(folded)))
    (out, logits), (same, same_logits) = call(folded), call(nnx.merge(graph, state))
    np.testing.assert_array_equal(out.hidden, same.hidden)
    np.testing.assert_array_equal(logits, same_logits)


class Other(FeedForward):
    """A branch that nobody knows."""


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pattern": [partial(PLAIN, placement="post")]}, "'post'"),
        ({"pattern": [partial(PLAIN, placement="sandwich")]}, "'sandwich'"),
        ({"pattern": [partial(PLAIN, mixer_norm=NoNorm)]}, "mixer_norm, not NoNorm"),
        ({"pattern": [partial(PLAIN, feed_forward=Other)]}, "feed_forward is Other"),
        ({"norm": RMSNorm}, "final norm, not RMSNorm"),
        ({"final_norm": False}, "final norm, not NoneType"),
        ({"embedding_norm": True}, "without a norm behind them"),
        ({"embeddings": False}, "embeddings of its own"),
        ({"head": partial(TiedHead, bias=True)}, "TiedHead without weights"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(options, word):
    with pytest.raises(UserError, match=word):
        fold_layer_norm(trunk(layers=1, **options))
