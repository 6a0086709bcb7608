"""LoLCATs: softmax where the window is long, one formula however it is computed, two steps that train what they should."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data import Records
from models import Bidirectional, Causal, LinearizedAttention, Vocabulary, linearize, llama
from models.block import Context
from models.decoding import Greedy, Prompts, Stop, TrunkDecoder, generate
from models.stack import unstack
from models.variables import flatten, replace_values
from objectives import AttentionTransfer, CausalLM
from partitioning import UserError
from training import Run, Sgd

V, D, S = 61, 24, 21
VOCABULARY = Vocabulary(size=V, pad=0, bos=1, eos=2, mask=3, cls=4, sep=5)
SIZES = {"width": D, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 32}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(6, V, (3, S)), jnp.int32)
SEGMENTS = jnp.asarray([[1] * S, [1] * 8 + [2] * 9 + [0] * 4, [1] + [2] * 10 + [3] * 10], jnp.int32)
POSITIONS = jnp.asarray([[*range(S)], [*range(8), *range(9), 0, 0, 0, 0], [0, *range(10), *range(10)]], jnp.int32)


def softmax():
    """A small Llama whose attention is far from even."""
    made = llama(VOCABULARY, **SIZES, rngs=nnx.Rngs(0))
    values = flatten(made, nnx.Param)
    replace_values(made, {n: x if n.endswith("scale") else 5 * x for n, x in values.items()})
    return made


def states(model, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS, **rest):
    return model(tokens, segments=segments, positions=positions, mask=Causal(), **rest)


def linear(window, **options):
    """The same, linearised, with window factors that differ."""
    made = linearize(softmax(), window=window, rngs=nnx.Rngs(1), **options)
    values = {n: x for n, x in flatten(made, nnx.Param).items() if n.endswith("window_factor")}
    replace_values(made, {n: x + jnp.arange(x.size).reshape(x.shape) for n, x in values.items()})
    return made


@pytest.mark.parametrize("window", [S, S + 9])
def test_a_window_as_long_as_the_text_is_softmax(window):
    """Whatever the maps and factors; so is a longer one."""
    np.testing.assert_allclose(states(linear(window)).hidden, states(softmax()).hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 4, 7, 20])
def test_the_formula(window):
    """One layer of one document in numpy, float64, every pair by itself."""
    with jax.enable_x64(True):
        mixer = LinearizedAttention(D, heads=4, kv_heads=2, window=window, features=3, theta=None, rngs=nnx.Rngs(0))
        p = {n: 8 * np.asarray(x, np.float64) for n, x in flatten(mixer, nnx.Param).items()}
        for path, leaf in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
            leaf.set_value(jnp.asarray(p["/".join(map(str, path))]))
        x = np.random.default_rng(1).standard_normal((S, D))
        here = jnp.ones((1, S), jnp.int32)
        context = Context(jnp.ones((1, S, S), bool), here, jnp.arange(S)[None], mask=Causal())
        found = mixer(jnp.asarray(x)[None], context)[0][0]
        q, k, v = (np.einsum("sd,dhk->shk", x, p[name]) for name in ("query", "key", "value"))
        soft = lambda z: (
            np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
        )
        features = lambda z, w: np.concatenate([soft(z @ w), soft(-(z @ w))], -1)
        out = np.zeros((S, D))
        for h in range(4):
            g = 1 / (1 + np.exp(-p["window_factor"][h]))
            fq, fk = features(q[:, h], p["feature_query"][h]), features(k[:, h // 2], p["feature_key"][h // 2])
            for i in range(S):
                near = np.arange(max(0, i - window + 1), i + 1)
                far = np.arange(0, max(0, i - window + 1))
                s = k[near, h // 2] @ q[i, h] / np.sqrt(q.shape[-1])
                a = np.concatenate([fk[far] @ fq[i], g * np.exp(s - s.max())])
                out[i] += a @ v[: i + 1, h // 2] / a.sum() @ p["out"][h]
        np.testing.assert_allclose(found, out, rtol=0, atol=1e-10 * np.abs(out).max())


@pytest.mark.parametrize("window", [3, 8])
def test_documents_are_alone(window):
    run, model = nnx.jit(states), linear(window)
    found = run(model).hidden
    for row, begin, end in ((0, 0, S), (1, 0, 8), (1, 8, 17), (2, 1, 11), (2, 11, 21)):
        size = end - begin
        tokens = jnp.zeros((1, S), jnp.int32).at[0, :size].set(TOKENS[row, begin:end])
        segments = jnp.zeros((1, S), jnp.int32).at[0, :size].set(7)
        alone = run(model, tokens, segments, jnp.arange(S)[None]).hidden
        np.testing.assert_allclose(found[row, begin:end], alone[0, :size], rtol=0, atol=3e-5)


@pytest.mark.parametrize("window", [3, 8])
def test_calls_and_tokens_change_nothing(window):
    """In two calls, or token by token, with the window and the state handed on."""
    model, step = linear(window), nnx.jit(states)
    whole = step(model).hidden
    for cuts in ((0, 6, S), tuple(range(S + 1))):
        cache, parts = model.empty_cache(3, S), []
        for a, b in pairwise(cuts):
            out = step(model, TOKENS[:, a:b], SEGMENTS[:, a:b], POSITIONS[:, a:b], cache=cache)
            cache, _ = out.cache, parts.append(out.hidden)
        found = jnp.concatenate(parts, axis=1)
        np.testing.assert_allclose(found[SEGMENTS > 0], whole[SEGMENTS > 0], rtol=0, atol=3e-5)


def test_generation_with_prompts_of_unequal_length():
    """Each row goes on as it does alone, without padding between its prompt and what it writes."""
    graph, state = nnx.split(linear(4))
    lengths = (9, 3, 6)
    here = jnp.asarray(np.arange(9) < np.array(lengths)[:, None], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    run = lambda s, p, k: generate(TrunkDecoder(nnx.merge(graph, s)), p, Greedy(), Stop(length=6), k).tokens
    together = jax.jit(run)(state, Prompts(TOKENS[:, :9], here), keys)
    for row, size in enumerate(lengths):
        alone = jax.jit(run)(state, Prompts(TOKENS[row : row + 1, :size], here[row : row + 1, :size]), keys[:1])
        np.testing.assert_array_equal(together[row], alone[0])


def test_transfer_goes_on_with_softmax_and_measures_the_difference():
    """States are the softmax model's; a layer's error is that of its two results, 0 under a long window."""
    given = linear(4)
    out = states(given, taps=("transfer",))
    np.testing.assert_allclose(out.hidden, states(softmax()).hidden, rtol=0, atol=2e-5)
    assert sorted(out.taps["transfer"]) == [0, 1, 2]
    first = np.asarray(out.taps["transfer"][0])
    assert first.shape == (3, S)
    np.testing.assert_allclose(first[0, :4], 0, atol=1e-9)
    assert (first[0, 6:] > 1e-5).all()
    for error in states(linear(S), taps=("transfer",)).taps["transfer"].values():
        np.testing.assert_allclose(error, 0, atol=1e-9)


def steps(objective, attention, freeze):
    """Parameters before and after two steps, layers by index."""
    run = Run(
        model=partial(llama, **SIZES, attention=attention),
        data=Records(examples=[{"text": "a text that is read again and again"}] * 8),
        objective=objective,
        optimizer=Sgd(learning_rate=1.0),
        batch_size=8,
        length=32,
        steps=2,
        freeze=freeze,
        guard=None,
    )
    plan = run.plan()
    stage = plan.stages[0]
    state, program = plan.init(), plan.compile(stage)
    before = {name: np.asarray(x) for name, x in (state.params | state.frozen).items()}
    for i in range(2):
        state, _ = program(state, plan.put(stage, stage.reader.batch(i, batch_size=8, length=32, seed=0)))
    after = {name: np.asarray(x) for name, x in (state.params | state.frozen).items()}
    return {name for name in before if (before[name] != after[name]).any()}


def test_the_first_step_moves_maps_and_factors_the_second_the_corrections():
    maps = partial(LinearizedAttention, window=4)
    moved = steps(AttentionTransfer(), maps, (r"^(?!.*(feature_|window_factor))",))
    assert moved
    assert {name.rsplit("/", 1)[1] for name in moved} == {"feature_query", "feature_key", "window_factor"}
    corrected = partial(LinearizedAttention, window=4, rank=2)
    moved = steps(CausalLM(), corrected, (r"^(?!.*_(down|up)$)",))
    parts = {f"{name}_{part}" for name in ("query", "key", "value", "out") for part in ("up", "down")}
    assert {name.rsplit("/", 1)[1] for name in moved} == parts


def test_corrections_begin_as_nothing_and_are_what_they_say():
    """up is 0 at first; then W + alpha / rank down up."""
    plain, corrected = linear(4), linear(4, rank=2, alpha=6.0)
    np.testing.assert_allclose(states(corrected).hidden, states(plain).hidden, rtol=0, atol=2e-5)
    draw = np.random.default_rng(3)
    ups = {n: x for n, x in flatten(corrected, nnx.Param).items() if n.endswith("_up")}
    replace_values(
        corrected, {n: jnp.asarray(0.3 * draw.standard_normal(x.shape), jnp.float32) for n, x in ups.items()}
    )
    values = flatten(corrected, nnx.Param)
    merged = {}
    for name in ("query", "key", "value", "out"):
        at = f"stack/scanned/0/mixer/{name}"
        down, up = values[f"{at}_down"], values[f"{at}_up"]
        product = jnp.einsum("lir,lro->lio", down.reshape(3, -1, 2), up.reshape(3, 2, -1))
        merged[at] = values[at] + 3.0 * product.reshape(values[at].shape)
    replace_values(plain, merged)
    np.testing.assert_allclose(states(corrected).hidden, states(plain).hidden, rtol=0, atol=1e-4)
    assert np.abs(states(corrected).hidden - states(linear(4)).hidden).max() > 0.1


def test_linearize_keeps_the_weights():
    """All that the softmax model has, scanned or not; what else there is, is new."""
    old, new = (unstack(flatten(m, nnx.Param)) for m in (softmax(), linearize(softmax(), rngs=nnx.Rngs(1))))
    assert all((old[name] == new[name]).all() for name in old)
    assert {re.sub(r".*/", "", name) for name in new.keys() - old} == {"feature_query", "feature_key", "window_factor"}
    with pytest.raises(UserError, match="no layer of this trunk has softmax attention"):
        linearize(linear(4), rngs=nnx.Rngs(0))


def test_what_is_refused():
    with pytest.raises(UserError, match=r"LinearizedAttention.window = 0: expected 1 token or more"):
        LinearizedAttention(D, window=0, rngs=nnx.Rngs(0))
    with pytest.raises(
        UserError, match="LinearizedAttention reads from left to right and cannot compute the mask Bidirectional"
    ):
        linear(4)(TOKENS, segments=SEGMENTS, positions=POSITIONS, mask=Bidirectional())
    with pytest.raises(UserError, match="AttentionTransfer: no layer of the trunk is linearised"):
        steps(AttentionTransfer(), None, ())
