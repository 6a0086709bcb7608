"""What a call of a trunk may ask for: states at some slots, and what its layers did."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from relations import ALL, FORMS, LAYERS, MASKS, PATTERNS, ROWS, SAME, TOKENS, WHERE, D, S, flat, trunk

from models import Causal
from models.positions import gather
from models.stack import unstack
from partitioning import UserError


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("form", ["attention", "blocks"])
@pytest.mark.parametrize(
    ("pattern", "layers", "scan", "remat"),
    [
        ("plain", 3, True, "none"),
        ("plain", 3, True, "full"),
        ("plain", 3, False, "dots"),
        ("patterned", 4, True, "none"),
        ("patterned", 5, True, "none"),
        ("plain", 1, True, "none"),
        ("plain", 0, True, "none"),
    ],
)
def test_states_at_some_slots_are_those_of_the_whole_row(pattern, layers, scan, remat, form, monkeypatch):
    """Values, side terms, caches and the gradients of everything; and the last layer does less."""
    monkeypatch.setitem(LAYERS, pattern, layers)
    graph, state = trunk(pattern, scan=scan, remat=remat, feed_forward=FORMS[form])
    draw = np.random.default_rng(8)
    x = jnp.asarray(draw.standard_normal((ROWS, S, D)))
    bias = jnp.asarray(draw.standard_normal((1, 2, S, S)))
    # Any order, a slot twice, and padding too.
    at = jnp.asarray(draw.integers(0, S, (ROWS, 4)))
    pull = jnp.asarray(draw.standard_normal((ROWS, 4, D)))

    def run(state, x, bias, asked):
        out = nnx.merge(graph, state)(embeddings=x, bias=bias, mask=ALL, at=asked, **WHERE)
        hidden = out.hidden if asked is not None else gather(out.hidden, at)
        sides = sum(side.total.sum() for side in out.aux.values())
        return (hidden * pull).sum() + sides, (hidden, out.aux)

    with_gradients = lambda asked: jax.jit(
        jax.value_and_grad(partial(run, asked=asked), argnums=(0, 1, 2), has_aux=True)
    )
    programs = [with_gradients(asked).lower(state, x, bias).compile() for asked in (None, at)]
    whole, some = (program(state, x, bias) for program in programs)
    if form == "attention" and not scan:
        before, after = (program.cost_analysis()["flops"] for program in programs)
        assert after < 0.9 * before
    assert jax.tree.structure(whole) == jax.tree.structure(some)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-11 * max(1, np.abs(a).max(initial=0))),
        whole,
        some,
    )

    def cached(state, asked):
        model = nnx.merge(graph, state)
        tokens = jnp.full((ROWS, S), 7)
        out = model(tokens, mask=Causal(), cache=model.empty_cache(ROWS, S), at=asked, **WHERE)
        return (out.hidden if asked is not None else gather(out.hidden, at)), out.cache

    whole, some = jax.jit(partial(cached, asked=None))(state), jax.jit(partial(cached, asked=at))(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-11), whole, some)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_taps_are_what_the_layers_did(backend, scan):
    """Every layer's states and attention weights, by index; asking changes nothing, and they rebuild the first layer."""
    graph, state = trunk("patterned", backend, scan)
    draw = np.random.default_rng(9)
    x = jnp.asarray(draw.standard_normal((ROWS, S, D)))

    def run(state, taps):
        out = nnx.merge(graph, state)(embeddings=x, mask=ALL, taps=taps, **WHERE)
        return out.hidden, out.taps

    plain, nothing = jax.jit(partial(run, taps=()))(state)
    hidden, taps = jax.jit(partial(run, taps=("layers", "attention")))(state)
    np.testing.assert_allclose(hidden, plain, rtol=0, atol=1e-13)
    assert nothing == {}
    layers, attention = np.asarray(taps["layers"]), {i: np.asarray(w) for i, w in taps["attention"].items()}
    assert layers.shape == (LAYERS["patterned"] + 1, ROWS, S, D)
    np.testing.assert_array_equal(layers[0], x)
    scale = unstack(flat(state))["final_norm/scale"]
    np.testing.assert_allclose(
        layers[-1] / np.sqrt((layers[-1] ** 2).mean(-1, keepdims=True) + 1e-6) * scale, plain, rtol=0, atol=1e-12
    )
    assert list(attention) == list(range(LAYERS["patterned"]))
    weights = unstack(flat(state))
    for i, found in attention.items():
        own = PATTERNS["patterned"][i % 2].allowed(TOKENS, TOKENS)[0]
        for row, (_, relation) in enumerate(MASKS.values()):
            seen = relation & SAME & np.asarray(own)
            np.testing.assert_array_equal(found[row] > 0, np.broadcast_to(seen, found[row].shape))
            np.testing.assert_allclose(
                found[row].sum(-1), np.broadcast_to(seen.any(-1), found[row].shape[:2]), atol=1e-12
            )
        # The layer by hand: weights times values, out, the residual, and its feed-forward layer.
        w = {name.split(f"layers/{i}/")[1]: np.asarray(v) for name, v in weights.items() if f"layers/{i}/" in name}
        norm = lambda y, scale: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale
        values = np.einsum("bsd,dhk->bshk", norm(layers[i], w["mixer_norm/scale"]), w["mixer/value"])
        mixed = layers[i] + np.einsum("bhqs,bshk,hkd->bqd", found, values, w["mixer/out"])
        inner = norm(mixed, w["feed_forward_norm/scale"]) @ w["feed_forward/inner"]
        after = mixed + np.asarray(jax.nn.gelu(inner, approximate=False)) @ w["feed_forward/outer"]
        np.testing.assert_allclose(layers[i + 1], after, rtol=0, atol=1e-11)
    with pytest.raises(UserError, match="without `at`"):
        nnx.merge(graph, state)(embeddings=x, taps=("layers",), at=jnp.zeros((ROWS, 1), jnp.int32), **WHERE)
