"""Gated linear mixers in small trunks: documents, padding, decoding, devices; and each beside ten lines of numpy."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from writing import VOCABULARY, full_passes, log_softmax, prompts, texts

from models import Block, Causal, FeedForward, GatedDeltaNet, GatedLinearAttention, Head, ReGLA, RMSNorm, Trunk, Window
from models.decoding import Greedy, Prompts, Stop, TrunkDecoder, generate
from models.linear_attention.gated_delta import unit
from models.linear_attention.regla import refined
from models.linear_attention.short_conv import ShortConvolution
from partitioning import UserError, fsdp_tensor

D = 8
MIXERS = {
    "gla": partial(GatedLinearAttention, heads=2, rank=3),
    "regla": partial(ReGLA, heads=2),
    "gated delta": partial(
        GatedDeltaNet, heads=4, key_heads=2, head_width=3, value_width=5, size=3, negative_eigenvalues=True
    ),
}
EACH = pytest.mark.parametrize("name", MIXERS)
STOP = Stop(length=4, pad=VOCABULARY.pad)


def trunk(name, dtype="float64", layers=3, size=0.5):
    """With weights large enough that every token before moves the next."""
    make = partial(Block, mixer=MIXERS[name], feed_forward=partial(FeedForward, hidden=8), norm=RMSNorm)
    made = nnx.eval_shape(
        lambda: Trunk(
            VOCABULARY,
            width=D,
            layers=layers,
            pattern=[make],
            head=Head,
            vocab_multiple=8,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
    )
    graph, state = nnx.split(made)
    draw = np.random.default_rng(4)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(size * draw.standard_normal(x.shape)), state))


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


def runner(model):
    """A jitted call over rows of tokens, segments and positions, and perhaps a cache."""
    graph, state = nnx.split(model)

    def run(state, tokens, segments, cache=None):
        positions = jnp.where(segments > 0, jnp.arange(segments.shape[1]), 0)
        out = nnx.merge(graph, state)(tokens, segments=segments, positions=positions, mask=Causal(), cache=cache)
        return out.hidden, out.cache

    compiled = jax.jit(run)
    ids = lambda x: jnp.asarray(x, jnp.int32)
    return lambda tokens, segments, cache=None: compiled(state, ids(tokens), ids(segments), cache)


@pytest.mark.usefixtures("_float64")
@EACH
def test_a_cache_read_in_pieces_equals_one_call(name):
    """Packed documents, padding in front, between, inside and behind; in one call, in two, and slot by slot."""
    model = trunk(name)
    run = runner(model)
    tokens = np.random.default_rng(0).integers(6, VOCABULARY.size, (3, 13))
    segments = np.array(
        [
            [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3],
            [0, 1, 1, 0, 0, 1, 1, 1, 2, 0, 2, 2, 0],
            [1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 2, 2, 2],
        ]
    )
    whole = run(tokens, segments)[0]
    for pieces in ([1, 5, 13], range(1, 14)):
        cache, start, found = model.empty_cache(3, 13), 0, []
        for end in pieces:
            out, cache = run(tokens[:, start:end], segments[:, start:end], cache)
            found.append(out)
            start = end
        np.testing.assert_allclose(
            jnp.concatenate(found, axis=1)[segments > 0], whole[segments > 0], rtol=0, atol=1e-11
        )
    # Holes are as if they were not there.
    for row in range(3):
        for document in np.unique(segments[row])[1:]:
            here = segments[row] == document
            alone = np.zeros((2, 3, 13), int)
            alone[0, 0, : here.sum()], alone[1, 0, : here.sum()] = tokens[row, here], 1
            np.testing.assert_allclose(run(*alone)[0][0, : here.sum()], whole[row, here], rtol=0, atol=1e-11)


@pytest.mark.usefixtures("_float64")
@EACH
def test_generation_from_padded_prompts(name):
    """Rows of unequal length, two documents in one of them: what full passes over each text alone would write."""
    model = trunk(name)
    given = prompts(2, 7, 1)
    segments = np.array(given.segments)
    segments[1] = [1, 1, 1, 2, 2, 2, 2]
    given = Prompts(given.tokens, jnp.asarray(segments))
    graph, state = nnx.split(model)
    run = jax.jit(
        lambda s: generate(
            TrunkDecoder(nnx.merge(graph, s)), given, Greedy(), STOP, jax.random.split(jax.random.key(0), 3)
        )
    )
    found = jax.device_get(run(state))
    passed = full_passes(model, 7 + STOP.length)
    for row, ids in enumerate(texts(given)):
        ids = ids[3:] if row == 1 else ids
        for t in range(STOP.length):
            logits = passed(ids)[1][-1]
            assert found.tokens[row, t] == logits.argmax()
            np.testing.assert_allclose(found.log_probability[row, t], log_softmax(logits).max(), atol=1e-9)
            ids = [*ids, int(logits.argmax())]


@EACH
def test_the_second_document_does_not_see_the_first(name):
    """In float32: nothing moves when the first changes, in training, prefill and decoding; nor with the other rows."""
    model = trunk(name, "float32")
    run = runner(model)
    draw = np.random.default_rng(1)
    tokens = draw.integers(6, VOCABULARY.size, (4, 15))
    tokens[:, 6:] = tokens[0, 6:]
    segments = np.repeat([[1, 2, 0]], [6, 7, 2], axis=1)[[0, 0, 0, 0]]
    for cache in (None, model.empty_cache(4, 17)):
        out, cache = run(tokens, segments, cache)
        outs = [out[:, 6:13]]
        for _ in range(2 if cache is not None else 0):
            out, cache = run(tokens[:, 7:8], np.full((4, 1), 2), cache)
            outs.append(out)
        for out in outs:
            size = float(jnp.abs(out).max())
            np.testing.assert_allclose(out[1:], jnp.broadcast_to(out[:1], out[1:].shape), rtol=0, atol=1e-6 * size)
    alone = run(tokens[:1, 6:13], np.full((1, 7), 1))[0]
    np.testing.assert_allclose(alone[0], outs[0][0], rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


@EACH
def test_bfloat16_is_finite(name):
    """Outputs and gradients over a longer text, with weights as they begin; outputs within bfloat16's reach of float32's."""
    make = partial(Block, mixer=MIXERS[name], feed_forward=partial(FeedForward, hidden=8), norm=RMSNorm)
    tokens = jnp.asarray(np.random.default_rng(0).integers(6, VOCABULARY.size, (1, 300)))
    where = {"segments": jnp.ones_like(tokens), "positions": jnp.arange(300)[None], "mask": Causal()}

    def run(dtype):
        made = partial(Trunk, VOCABULARY, width=D, layers=1, pattern=[make], vocab_multiple=8, dtype=dtype)
        graph, state = nnx.split(made(rngs=nnx.Rngs(0)))
        return lambda state: nnx.merge(graph, state)(tokens, **where).hidden.astype(jnp.float32), state

    low, state = run("bfloat16")
    both = jax.jit(lambda state: (*jax.vjp(low, state)[1](jnp.ones((1, 300, D), jnp.float32)), low(state)))
    *slopes, found = both(state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slopes))
    assert float(jnp.abs(found - jax.jit(run("float32")[0])(state)).mean()) < 0.05


def alone(name, length=9, seed=3):
    """A mixer by itself, its weights in numpy, one document of hidden states, and the mixer's result."""
    mixer = MIXERS[name](D, rngs=nnx.Rngs(0))
    graph, state = nnx.split(mixer)
    draw = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(0.5 * draw.standard_normal(x.shape)), state)
    w = {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
    x = draw.standard_normal((length, D))
    context = SimpleNamespace(
        segments=jnp.ones((1, length), jnp.int32), positions=jnp.arange(length)[None], before=None, cache=None, bias=None,
        source=None, mask=Causal(), at=None, layer=0,
    )  # fmt: skip
    return w, x, np.asarray(nnx.merge(graph, state)(jnp.asarray(x)[None], context)[0][0])


sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
project = lambda x, w: np.tensordot(x, w, 1)
normed = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def read(q, k, v, decay):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, read by the queries, for each head."""
    state, out = np.zeros((*k.shape[1:], v.shape[-1])), []
    for now in range(len(q)):
        state = decay[now][..., None] * state + k[now][..., None] * v[now][:, None]
        out.append(np.einsum("hk,hkv->hv", q[now], state))
    return np.array(out)


@pytest.mark.usefixtures("_float64")
def test_gla_in_numpy():
    w, x, found = alone("gla")
    decay = sigmoid(project(x @ w["forget_in"], w["forget_out"]) + w["forget_bias"]) ** (1 / 16)
    q, k, v = (project(x, w[name]) for name in ("query", "key", "value"))
    out = w["norm/scale"] * normed(read(q / np.sqrt(q.shape[-1]), k, v, decay)) * silu(project(x, w["gate"]))
    np.testing.assert_allclose(np.einsum("shv,hvd->sd", out, w["out"]), found, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_regla_in_numpy():
    w, x, found = alone("regla")
    g, r = sigmoid(project(x, w["forget"]) + w["forget_bias"]), sigmoid(project(x, w["refine"]))
    q, k, v = (project(x, w[name]) for name in ("query", "key", "value"))
    phi = lambda z: np.exp(z - z.max(-1, keepdims=True))
    scale = 1 / (np.e * np.sqrt(4 * (np.e**2 - 1)))
    out = normed(read(scale * phi(q), phi(k), v, (1 - r) * g**2 + r * (1 - (1 - g) ** 2)))
    np.testing.assert_allclose(np.einsum("shv,hvd->sd", out, w["out"]), found, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_float64")
def test_gated_delta_net_in_numpy():
    w, x, found = alone("gated delta")

    def convolved(name):
        z, kernel = project(x, w[name]), w[f"{name}_conv/kernel"]
        back = np.concatenate([np.zeros((2, *z.shape[1:])), z])
        return silu(sum(kernel[j] * back[j : j + len(z)] for j in range(3)))

    q, k, v = (convolved(name) for name in ("query", "key", "value"))
    q, k = (np.repeat(z / np.sqrt((z * z).sum(-1, keepdims=True) + 1e-6), 2, axis=1) for z in (q, k))
    rate = 2 * sigmoid(project(x, w["rate"]))
    decay = np.exp(-np.exp(w["log_strength"]) * np.log1p(np.exp(project(x, w["decay"]) + w["decay_bias"])))
    state, out = np.zeros((4, 3, 5)), []
    for t in range(len(x)):
        gone = np.eye(3) - rate[t][:, None, None] * k[t][..., None] * k[t][:, None]
        state = decay[t][:, None, None] * gone @ state + rate[t][:, None, None] * k[t][..., None] * v[t][:, None]
        out.append(np.einsum("hk,hkv->hv", q[t] / np.sqrt(3), state))
    out = w["norm/scale"] * normed(np.array(out)) * silu(project(x, w["gate"]))
    np.testing.assert_allclose(np.einsum("shv,hvd->sd", out, w["out"]), found, rtol=0, atol=1e-12)


def test_the_refined_gate():
    """g where r is a half; the formula elsewhere, exact next to 0 and 1; finite slopes however far it is shut or open."""
    z = jnp.linspace(-80.0, 80.0, 161)
    np.testing.assert_allclose(refined(z, jnp.zeros_like(z)), jax.nn.log_sigmoid(z), rtol=1e-6)
    a, b = np.meshgrid(np.linspace(-12, 12, 25), np.linspace(-12, 12, 25))
    g, r = sigmoid(a), sigmoid(b)
    exact = np.log((1 - r) * g**2 + r * (1 - (1 - g) ** 2))
    np.testing.assert_allclose(refined(jnp.float32(a), jnp.float32(b)), exact, rtol=2e-6)
    slopes = jax.vmap(jax.grad(refined, argnums=(0, 1)))(*(jnp.asarray(x).ravel() for x in jnp.meshgrid(z, z)))
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)
    # Where g is stuck near 1, r moves the gate more than g does.
    open_gate = jax.grad(refined, argnums=(0, 1))(8.0, 0.0)
    assert open_gate[1] > 0


def test_gated_delta_net_begins_as_published():
    """Decays of many heads, and no weight decay on what makes them."""
    from training.optimizers import decays_by_default

    mixer = GatedDeltaNet(8, heads=4000, key_heads=1, head_width=2, value_width=1, rngs=nnx.Rngs(0))
    strength = np.exp(mixer.log_strength.get_value())
    pace = np.log1p(np.exp(np.float64(mixer.decay_bias.get_value())))
    assert strength.min() > 0.0099
    assert strength.max() < 16.001
    assert abs(strength.mean() - 8) < 0.3
    assert pace.min() > 0.00099
    assert pace.max() < 0.101
    assert abs(np.log(pace).mean() - np.log(1e-2)) < 0.1
    assert not decays_by_default("mixer/log_strength", ("heads",))
    assert not decays_by_default("mixer/decay_bias", ("heads",))
    np.testing.assert_allclose(np.square(unit(jnp.asarray([[3.0, 4.0]]))).sum(), 1, rtol=1e-6)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("name", ["gated delta"])
def test_eight_devices_equal_one(name):
    """Gradients under fsdp_tensor, the rows packed."""
    draw = np.random.default_rng(2)
    tokens = jnp.asarray(draw.integers(6, VOCABULARY.size, (8, 12)), jnp.int32)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [5, 6, 1], axis=1)[[0] * 8], jnp.int32)
    graph, state = nnx.split(trunk(name, layers=1))

    def loss(state, tokens, segments):
        positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
        out = nnx.merge(graph, state)(tokens, segments=segments, positions=positions, mask=Causal()).hidden
        return (jnp.sin(out) * (1 + jnp.arange(out.size).reshape(out.shape) % 7)).sum()

    found = []
    for count in (1, 8):
        place = fsdp_tensor(2 if count == 8 else 1).place(jax.devices()[:count])
        rows = [jax.device_put(x, place.rows(x.shape, n)) for x, n in ((tokens, "tokens"), (segments, "segments"))]
        with place.scope():
            found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(state, *rows)))
    for one, eight in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(eight, one, rtol=0, atol=1e-10 * max(1, np.abs(one).max()))


@EACH
def test_what_is_refused(name):
    """One line each."""
    model = trunk(name, "float32", layers=1)
    tokens = jnp.zeros((1, 3), jnp.int32)
    where = {"segments": jnp.ones_like(tokens), "positions": jnp.arange(3)[None]}
    with pytest.raises(UserError, match="reads from left to right and cannot compute the mask Window"):
        model(tokens, mask=Causal() & Window(1), **where)
    sizes = {
        "gla": {"heads": 3},
        "regla": {"heads": 3},
        "gated delta": {"heads": 4, "key_heads": 3},
    }
    with pytest.raises(UserError, match="divide"):
        MIXERS[name].func(D, **sizes[name], rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="three quarters of the width 8"):
        GatedDeltaNet(D, heads=4, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="a convolution over 0 tokens"):
        ShortConvolution(2, 2, size=0, rngs=nnx.Rngs(0))
