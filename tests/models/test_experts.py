"""A mixture of experts: the grouped form against the dense oracle, and the side terms against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Experts
from partitioning import UserError

B, S, D, E = 3, 5, 6, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def layer(**changes):
    """A layer with float64 weights that the seed decides, whatever its form."""
    made = nnx.eval_shape(lambda: Experts(D, experts=E, hidden=7, rngs=nnx.Rngs(0), **changes))
    graph, state = nnx.split(made)
    draw = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape)), state)


def example(same: bool = False):
    """States, a cotangent, and which tokens are there; with `same`, all tokens go to the same experts."""
    draw = np.random.default_rng(1)
    x = draw.standard_normal((B, S, D))
    x = np.broadcast_to(x[:1, :1], x.shape) if same else x
    return jnp.asarray(x), jnp.asarray(draw.standard_normal((B, S, D))), jnp.asarray(draw.random((B, S)) < 0.7)


@pytest.mark.parametrize("same", [False, True], ids=["spread", "one choice"])
@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (2, True), (E, False)])
def test_grouped_is_dense(top_k, renormalise, same):
    """Outputs and the gradients of states, router and experts, even where most experts get no token."""
    x, pull, present = example(same)
    found = []
    for form in ("grouped", "dense"):
        graph, state = layer(form=form, top_k=top_k, renormalise=renormalise)

        def loss(state, x, graph=graph):
            out, sides = nnx.merge(graph, state)(x, present)
            return (out * pull).sum() + 0.3 * sides["z"].total + sides["balance"].total.sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
        found.append((out, [np.asarray(g) for g in jax.tree.leaves(gradients)]))
    (out, gradients), (expected, others) = found
    np.testing.assert_allclose(out, expected, atol=1e-11)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-10)


@pytest.mark.parametrize("top_k", [1, 3])
def test_output_and_side_terms_are_ten_lines_of_numpy(top_k):
    """Every token by itself; padding is transformed and not counted."""
    x, _, present = example()
    graph, state = layer(top_k=top_k, balance=0.02, z=0.005)
    out, sides = jax.jit(lambda state, x: nnx.merge(graph, state)(x, present))(state, x)
    router, inner, gate, outer = (np.asarray(state[name].get_value()) for name in ("router", "inner", "gate", "outer"))
    silu = lambda v: v / (1 + np.exp(-v))
    expected, chosen, mean, z = np.zeros(out.shape), np.zeros(E), np.zeros(E), 0.0
    for place in np.ndindex(B, S):
        v = np.asarray(x)[place]
        logits = v @ router
        share = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-share)[:top_k]
        expected[place] = sum(share[e] * (silu(v @ inner[e]) * (v @ gate[e])) @ outer[e] for e in best)
        if present[place]:
            chosen[best] += 1
            mean += share
            z += np.log(np.exp(logits).sum()) ** 2
    tokens = int(present.sum())
    np.testing.assert_allclose(out, expected, atol=1e-11)
    balance = sides["balance"]
    value = (balance.fixed / tokens * balance.total / balance.weight).sum()
    np.testing.assert_allclose(value, E * (chosen / (top_k * tokens) * mean / tokens).sum(), rtol=1e-12)
    np.testing.assert_allclose(sides["z"].total / sides["z"].weight, z / tokens, rtol=1e-12)
    assert (balance.coefficient, sides["z"].coefficient) == (0.02, 0.005)
    assert balance.weight == sides["z"].weight == tokens


def test_an_even_router_is_balanced_at_one():
    """The balance term's smallest value."""
    x, _, present = example()
    graph, state = layer(top_k=E)
    state["router"].set_value(jnp.zeros((D, E)))
    _, sides = nnx.merge(graph, state)(x, present)
    balance = sides["balance"]
    assert float((balance.fixed / balance.weight * balance.total / balance.weight).sum()) == pytest.approx(1.0)


def test_more_choices_than_experts():
    """Refused by name."""
    with pytest.raises(UserError, match=r"Experts\.top_k = 5 is more than Experts\.experts = 4"):
        Experts(D, experts=E, top_k=5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gated", [False, True])
def test_a_shared_expert_is_added(gated):
    """To what the routed ones give: a dense layer's result, gated or not; side terms know nothing of it."""
    x, _, present = example()
    graph, state = layer(shared=5, shared_gate=gated)
    made = nnx.merge(graph, state)
    out, sides = made(x, present)
    shared, gate = made.shared, made.shared_gate
    made.shared = None
    routed, others = made(x, present)
    extra, _ = shared(x, present)
    extra = extra if gate is None else extra / (1 + np.exp(-np.asarray(x @ gate.get_value())))[..., None]
    np.testing.assert_allclose(out, routed + extra, atol=1e-12)
    assert sides.keys() == others.keys()
    with pytest.raises(UserError, match="shared_gate without"):
        Experts(D, shared_gate=True, rngs=nnx.Rngs(0))
