"""Routers: reductions to each other, numpy, and what moves their statistics and what they refuse."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import (
    Bidirectional,
    ExpertChoice,
    Experts,
    FeedForward,
    HashRouter,
    MaskedRouter,
    SigmoidRouter,
    TopKRouter,
    WarmUpRouter,
)
from models.mixture.by_token import is_frequent
from models.side import apart
from models.variables import Statistic, flatten
from partitioning import UserError

B, S, D, E, V = 3, 5, 6, 4, 37
DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((B, S, D))
PRESENT = DRAW.random((B, S)) < 0.7
TOKENS = DRAW.integers(0, V, (B, S))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def context(**changes):
    """What a router reads of a block's context."""
    plain = {"tokens": jnp.asarray(TOKENS), "vocabulary": V, "keys": None, "mask": Bidirectional(), "cache": None}
    return SimpleNamespace(**plain | changes)


def router(kind, *, experts=E, top_k=2, **options):
    """One of a kind, its matrix large enough to decide."""
    made = kind(D, experts=experts, top_k=top_k, rngs=nnx.Rngs(0), **options)
    if hasattr(made, "kernel"):
        made.kernel.set_value(jnp.asarray(np.random.default_rng(1).standard_normal((D, experts))))
    return made


def routed(made, x=X, **changes):
    return made(jnp.asarray(x), jnp.asarray(PRESENT), context(**changes))


def dense(routing):
    """Weights by expert, and which are taken, in numpy."""
    out = np.zeros((*routing.chosen.shape[:2], routing.taken.shape[-1]))
    for place in np.ndindex(routing.chosen.shape):
        out[*place[:2], routing.chosen[place]] += routing.weights[place]
    return out, np.asarray(routing.taken)


def logits(made, x=X):
    return x @ np.asarray(made.kernel.get_value())


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def test_renormalised_is_a_softmax_after_the_choice():
    """Over the k largest logits alone; and `scale` multiplies."""
    made = router(TopKRouter, renormalise=True, scale=2.5)
    found, own = routed(made), logits(made)
    best = np.sort(own, -1)[..., ::-1][..., :2]
    np.testing.assert_allclose(found.weights, 2.5 * softmax(best), rtol=1e-12)
    plain = routed(router(TopKRouter))
    np.testing.assert_allclose(plain.weights, np.sort(softmax(own), -1)[..., ::-1][..., :2], rtol=1e-12)
    np.testing.assert_array_equal(dense(plain)[1].sum(-1), 2)


def test_sigmoid_with_groups_is_a_loop_in_numpy():
    """A bias chooses and does not weigh; experts outside the best groups are never chosen, even at negative scores."""
    made = router(SigmoidRouter, experts=8, top_k=3, groups=4, top_groups=2, scale=2.5)
    bias = np.random.default_rng(2).standard_normal(8) - 1
    made.bias.set_value(jnp.asarray(bias))
    weights, taken = dense(routed(made))
    scores = 1 / (1 + np.exp(-logits(made)))
    for place in np.ndindex(B, S):
        ranked = (scores[place] + bias).reshape(4, 2)
        groups = np.argsort(-ranked.sum(-1))[:2]
        allowed = [e for e in range(8) if e // 2 in groups]
        best = sorted(allowed, key=lambda e: -(scores[place] + bias)[e])[:3]
        expected = np.zeros(8)
        expected[best] = 2.5 * scores[place][best] / scores[place][best].sum()
        np.testing.assert_allclose(weights[place], expected, rtol=1e-10)
        assert set(np.flatnonzero(taken[place])) == set(best)
    plain, limited = (router(SigmoidRouter, experts=8, groups=g, top_groups=g) for g in (1, 4))
    np.testing.assert_array_equal(routed(plain).chosen, routed(limited).chosen)


def sums(made, **changes):
    """The cotangents of a router's statistics in a training call."""
    graph, state = nnx.split(made)

    def loss(state):
        model = nnx.merge(graph, state)
        model.train()
        return (routed(model, **changes).weights ** 2).sum()

    return flatten(nnx.merge(graph, jax.grad(loss, allow_int=True)(state)), Statistic)


def test_the_bias_moves_by_the_sign_of_the_load():
    """Its cotangent counts the choices of tokens that are there; what is chosen less becomes likelier."""
    made = router(SigmoidRouter, rate=0.01)
    counts = (dense(routed(made))[1] * PRESENT[..., None]).sum((0, 1))
    found = sums(made)
    np.testing.assert_array_equal(found["bias"], counts)
    made.observe(found)
    np.testing.assert_allclose(made.bias.get_value(), 0.01 * np.sign(counts.mean() - counts), rtol=1e-12)
    before = np.asarray(made.bias.get_value())
    made.observe({"bias": jnp.zeros(E)})
    np.testing.assert_array_equal(made.bias.get_value(), before)


def test_the_bias_balances():
    """A router that sends all to two of eight experts comes to within a tenth of even; without a bias it stays."""
    x = np.random.default_rng(3).standard_normal((8, 64, D))
    x[..., 0] = 1
    everyone = jnp.ones((8, 64), bool)
    for rate, even in ((0.005, True), (0.0, False)):
        made = router(SigmoidRouter, experts=8, rate=rate)
        made.kernel.set_value(made.kernel.get_value().at[0].add(jnp.where(jnp.arange(8) < 2, 1.0, -1.0)))
        for _ in range(400):
            load = made(jnp.asarray(x), everyone).taken.sum((0, 1))
            made.observe({"bias": load})
        assert (load.max() / load.mean() < 1.1) == even


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), B)


def test_the_warm_up_ends_at_the_plain_router():
    """Before it logits are noise of the running mean and spread; after it, and whenever it is used, they are x R."""
    made, plain = router(WarmUpRouter, steps=4), routed(router(TopKRouter))
    np.testing.assert_array_equal(routed(made, keys=keys()).logits, plain.logits)
    made.train()
    with pytest.raises(UserError, match="WarmUpRouter draws in training, and this call has no keys"):
        routed(made)
    made.mean.set_value(jnp.asarray(3.0))
    made.mean_square.set_value(jnp.asarray(13.0))
    first = np.stack([routed(made, keys=keys(i)).logits for i in range(200)])
    assert abs(first.mean() - 3) < 0.1
    assert abs(first.std() - 2) < 0.1
    np.testing.assert_array_equal(routed(made, keys=keys(0)).logits, first[0])
    for i in range(5):
        made.updates.set_value(jnp.asarray(float(i)))
        a = min(i / 4, 1)
        np.testing.assert_allclose(routed(made, keys=keys()).logits, a * plain.logits + (1 - a) * first[0], atol=1e-12)


def test_the_warm_up_sees_the_logits():
    """Its running means are those of the clean logits of tokens that are there, over steps that had any."""
    made = router(WarmUpRouter, decay=0.5)
    seen = logits(made)[PRESENT]
    for _ in range(40):
        made.observe(sums(made, keys=keys()))
    np.testing.assert_allclose(made.mean.get_value(), seen.mean(), rtol=1e-9)
    np.testing.assert_allclose(made.mean_square.get_value(), (seen**2).mean(), rtol=1e-9)
    assert made.updates.get_value() == 40
    made.observe({name: jnp.zeros(()) for name in ("mean", "mean_square", "updates")})
    assert made.updates.get_value() == 40


COUNTS = np.arange(V, 0, -1.0)


def test_a_mask_that_hides_nothing_is_the_plain_router():
    """Outputs, side terms and gradients of a layer."""
    results = []
    for kind in (TopKRouter, partial(MaskedRouter, frequencies=COUNTS, share=1.0, frequent=E, rare=E)):
        _, state, loss = layer(kind)
        results.append(jax.value_and_grad(loss, has_aux=True)(state))
    for a, b in zip(*(jax.tree.leaves(r) for r in results), strict=True):
        np.testing.assert_array_equal(a, b)


def layer(kind, **changes):
    """Experts with a router, and a loss of their parameters."""
    made = Experts(D, experts=E, top_k=2, hidden=3, router=kind, rngs=nnx.Rngs(0), **changes)
    graph, state, rest = nnx.split(made, nnx.Param, ...)
    draw = np.random.default_rng(5)
    state = jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape)), state)

    def loss(state, x=X):
        out, sides = nnx.merge(graph, state, rest)(jnp.asarray(x), jnp.asarray(PRESENT), context())
        return (out**2).sum() + sum(side.total.sum() for side in apart(sides)[0].values()), out

    return graph, state, loss


def test_one_visible_expert_is_hash_routing():
    """The same table by either router gives the same layer, k of which one counts."""
    table = np.random.default_rng(4).integers(0, E, V)
    masked = router(MaskedRouter, frequencies=COUNTS, frequent=1, rare=1)
    assert (np.asarray(masked.visible.get_value()).sum(-1) == 1).all()
    masked.visible.set_value(jnp.asarray(np.eye(E, dtype=bool)[table]))
    hashed = router(HashRouter, top_k=1, vocabulary=V)
    assert hashed.table.get_value().shape == (V, 1)
    hashed.table.set_value(jnp.asarray(table[:, None]))
    for a, b in zip(dense(routed(masked)), dense(routed(hashed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_hidden_experts_get_no_gradient():
    """Not from a token that may not see them, to the last bit."""
    kind = partial(MaskedRouter, frequencies=COUNTS, share=0.5, frequent=3, rare=1)
    graph, state, _ = layer(kind)
    made = Experts(D, experts=E, top_k=2, hidden=3, router=kind, rngs=nnx.Rngs(0))
    visible = np.asarray(made.router.visible.get_value())
    _, _, rest = nnx.split(made, nnx.Param, ...)
    for place in list(np.ndindex(B, S))[:6]:

        def loss(state, place=place):
            out, _ = nnx.merge(graph, state, rest)(jnp.asarray(X), jnp.asarray(PRESENT), context())
            return (out[place] ** 2).sum()

        gradient = jax.grad(loss)(state)
        for name in ("inner", "gate", "outer"):
            touched = np.abs(gradient[name].get_value()).reshape(E, -1).max(-1) > 0
            assert not (touched & ~visible[TOKENS[place]]).any()
            assert touched.any()
        touched = np.abs(gradient["router"]["kernel"].get_value()).max(0) > 0
        assert not (touched & ~visible[TOKENS[place]]).any()


def test_frequent_ids_are_those_of_most_of_the_text():
    """The most frequent first; ids that never occur are rare."""
    counts = np.array([0, 5, 50, 1, 40, 4.0])
    assert np.flatnonzero(is_frequent(counts, 0.5)).tolist() == [2]
    assert np.flatnonzero(is_frequent(counts, 0.9)).tolist() == [2, 4]
    assert np.flatnonzero(is_frequent(counts, 1.0)).tolist() == [1, 2, 3, 4, 5]
    made = router(MaskedRouter, frequencies=counts, share=0.9, frequent=3, rare=1)
    assert np.asarray(made.visible.get_value()).sum(-1).tolist() == [1, 1, 3, 1, 3, 1]


def test_frequencies_from_a_file(tmp_path):
    """A row of counts; what is none is refused with its name."""
    np.save(tmp_path / "counts.npy", COUNTS.astype(np.int64))
    made = router(MaskedRouter, frequencies=str(tmp_path / "counts.npy"))
    np.testing.assert_array_equal(
        made.visible.get_value(), router(MaskedRouter, frequencies=COUNTS).visible.get_value()
    )
    (tmp_path / "text.npy").write_text("no array")
    for name in ("absent.npy", "text.npy"):
        with pytest.raises(UserError, match=rf"MaskedRouter.frequencies = '.*{name}': cannot be read"):
            router(MaskedRouter, frequencies=str(tmp_path / name))


def test_expert_choice_is_a_loop_in_numpy():
    """Every expert takes its C likeliest of a row; a token's result is the sum over those that took it."""
    _, state, loss = layer(ExpertChoice)
    _, out = loss(state)
    kernel = np.asarray(state["router"]["kernel"].get_value())
    matrices = [np.asarray(state[name].get_value()) for name in ("inner", "gate", "outer")]
    shares = softmax(X @ kernel)
    expected, most = np.zeros((B, S, D)), -(-2 * S // E)
    for b, e in np.ndindex(B, E):
        here = [s for s in np.argsort(-shares[b, :, e]) if PRESENT[b, s]][:most]
        for s in here:
            inner, gate, outer = (m[e] for m in matrices)
            a = X[b, s] @ inner
            expected[b, s] += shares[b, s, e] * ((a / (1 + np.exp(-a)) * (X[b, s] @ gate)) @ outer)
    np.testing.assert_allclose(out, expected, atol=1e-11)


def test_expert_choice_of_all_tokens_is_the_dense_layer():
    """Where every expert takes every token, so does every token every expert."""
    everyone = jnp.ones((B, S), bool)
    outs = []
    for kind in (ExpertChoice, TopKRouter):
        made = Experts(D, experts=E, top_k=E, hidden=3, router=kind, rngs=nnx.Rngs(0))
        outs.append(made(jnp.asarray(X), everyone)[0])
    np.testing.assert_allclose(*outs, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (SigmoidRouter, {"groups": 3}, r"Experts.experts = 4 in SigmoidRouter.groups = 3"),
        (
            SigmoidRouter,
            {"groups": 2, "top_groups": 3},
            r"SigmoidRouter.top_groups = 3: expected 1 to SigmoidRouter.groups = 2",
        ),
        (
            SigmoidRouter,
            {"groups": 2, "top_groups": 1, "top_k": 3},
            r"top_k = 3 is more than the 2 experts in the groups",
        ),
        (WarmUpRouter, {"steps": 0}, r"WarmUpRouter.steps = 0"),
        (HashRouter, {"vocabulary": V, "top_k": 5}, r"top_k = 5 is more than the 4 experts"),
        (MaskedRouter, {"frequencies": COUNTS, "frequent": 5}, r"frequent = 5: expected .* the 4 experts"),
        (MaskedRouter, {"frequencies": COUNTS, "share": 1.5, "frequent": 2}, r"share = 1.5: expected"),
        (MaskedRouter, {"frequent": 2}, r"MaskedRouter.frequencies: expected a count for each token id"),
    ],
)
def test_what_cannot_be_is_refused(kind, options, words):
    """By name."""
    with pytest.raises(UserError, match=words):
        router(kind, **options)


def test_experts_that_choose_have_no_form():
    """All take as many."""
    with pytest.raises(UserError, match=r"Experts\.form = 'blocks': experts that choose all take as many"):
        layer(ExpertChoice, form="blocks")[2](layer(ExpertChoice)[1])


def test_routers_by_id_need_ids():
    """A call with embeddings alone is refused."""
    with pytest.raises(UserError, match="HashRouter goes by token ids, and this call has embeddings"):
        routed(router(HashRouter, vocabulary=V), tokens=None)
    with pytest.raises(UserError, match=r"HashRouter\.vocabulary: expected how many ids there are, outside a trunk"):
        router(HashRouter)


def test_dense_layers_know_nothing_of_a_context():
    """They are called with the states and which are there."""
    out, sides = FeedForward(D, rngs=nnx.Rngs(0))(jnp.asarray(X), jnp.asarray(PRESENT))
    assert out.shape == X.shape
    assert sides == {}
