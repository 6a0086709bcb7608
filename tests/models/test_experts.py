"""A mixture of experts: every form against the dense oracle and numpy, and the side terms against numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import collectives

from models import Experts, TopKRouter
from models.mixture import blocks as module
from models.mixture.blocks import blocks, plan
from models.mixture.dispatch import dense, ragged
from partitioning import UserError, data, fsdp, fsdp_expert, fsdp_sequence, fsdp_tensor
from training.flops import FlopCount, executed_flops, forward_flops

B, S, D, E = 3, 5, 6, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def layer(rows=B, **changes):
    """A layer with float64 weights that the seed decides, whatever its form."""
    made = nnx.eval_shape(lambda: Experts(D, experts=E, hidden=8, rngs=nnx.Rngs(0), **changes))
    graph, state = nnx.split(made)
    draw = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape)), state)


def example(same: bool = False, rows: int = B, length: int = S):
    """States, a cotangent, and which tokens are there; with `same`, all tokens go to the same experts."""
    draw = np.random.default_rng(1)
    x = draw.standard_normal((rows, length, D))
    x = np.broadcast_to(x[:1, :1], x.shape) if same else x
    pull, present = draw.standard_normal(x.shape), draw.random((rows, length)) < 0.7
    return jnp.asarray(x), jnp.asarray(pull), jnp.asarray(present)


def found(x, pull, present, top_k=2, renormalise=False, **changes):
    """Output, side terms and all gradients of a layer, by name."""
    graph, state = layer(top_k=top_k, router=partial(TopKRouter, renormalise=renormalise), **changes)

    def loss(state, x):
        out, sides = nnx.merge(graph, state)(x, present)
        return (out * pull).sum() + 0.3 * sides["z"].total + sides["balance"].total.sum(), (out, sides)

    (_, (out, sides)), (by_weight, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(state, x)
    flat = {"/".join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(by_weight)}
    return out, sides, flat | {"x": by_x}


def assert_alike(one, other):
    """Outputs and gradients within 1e-10."""
    np.testing.assert_allclose(one[0], other[0], atol=1e-10)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        assert np.abs(gradient).max() > 1e-3, f"{name} has no gradient to compare"
        np.testing.assert_allclose(gradient, other[2][name], atol=1e-10, err_msg=name)


@pytest.mark.parametrize("form", ["blocks", "ragged", "capacity"])
@pytest.mark.parametrize("same", [False, True], ids=["spread", "one choice"])
@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (2, True), (E, False)])
def test_every_form_is_the_dense_one(form, top_k, renormalise, same):
    """Outputs and all gradients, even where most experts get no token; a capacity that drops nothing too."""
    inputs = example(same)
    changes = {"top_k": top_k, "renormalise": renormalise}
    own = found(*inputs, form=form, capacity=E / top_k if form == "capacity" else None, **changes)
    assert_alike(own, found(*inputs, form="dense", **changes))
    if form == "capacity":
        assert own[1]["experts"].dropped.tolist() == [0] * E
        assert own[1]["experts"].chosen.sum() == inputs[2].sum() * top_k


def test_one_token_and_many():
    """One token, and so many that an expert has several blocks of unequal filling."""
    for rows, length in ((1, 1), (5, 61)):
        inputs = example(rows=rows, length=length)
        inputs = (*inputs[:2], jnp.ones((rows, length), bool))
        assert_alike(found(*inputs, form="blocks"), found(*inputs, form="dense"))


SIZES = {
    "even": [16] * 8,
    "uneven": [1, 70, 0, 3, 33, 0, 5, 16],
    "all to one": [0, 0, 128] + [0] * 5,
    "last": [0] * 7 + [128],
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_blocks_of_any_filling(sizes, rows, dtype, monkeypatch):
    """Forward and backward, with blocks that are full, in part and not there at all."""
    monkeypatch.setattr(module, "SMALLEST", rows)
    jax.clear_caches()
    draw = np.random.default_rng(0)
    n = sum(sizes) // 2
    chosen = draw.permutation(np.repeat(np.arange(8), sizes)).reshape(n, 2).astype(np.int32)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)
    args = normal(n, D), normal(n, 2), normal(8, D, 7), normal(8, D, 7), normal(8, 7, D)
    pull, atol = normal(n, D), 1e-10 if dtype == np.float64 else 2e-5
    laid = plan(jnp.asarray(chosen), 8)
    assert laid.rows == rows
    assert laid.used == sum(-(-size // rows) for size in sizes)
    forms = {
        "blocks": lambda x, w, *m: blocks("silu", x, w, chosen, *m),
        "ragged": lambda x, w, *m: ragged("silu", x, w, chosen, *m),
        "dense": lambda x, w, *m: dense("silu", x, w, chosen, m),
    }
    run = lambda f: jax.jit(jax.value_and_grad(lambda *a: (f(*a) * pull).sum(), tuple(range(5))))(*args)
    expected, gradients = run(forms["dense"])
    for name in ("blocks", "ragged"):
        value, own = run(forms[name])
        np.testing.assert_allclose(value, expected, rtol=atol, err_msg=name)
        for a, b in zip(own, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=atol * np.abs(b).max(), err_msg=name)
    jax.clear_caches()


def test_bfloat16_sums_matrices_gradients_in_float32():
    """Many blocks of one expert, all of one sign: a sum in bfloat16 would stop growing."""
    draw, tokens = np.random.default_rng(0), 2**16
    shapes = ((tokens, D), (tokens, 1), (2, D, 7), (2, D, 7), (2, 7, D))
    args = [jnp.asarray(np.abs(draw.standard_normal(s)), jnp.bfloat16) for s in shapes]
    chosen = jnp.zeros((tokens, 1), jnp.int32)
    grad = jax.jit(jax.grad(lambda *a: blocks("silu", *a[:2], chosen, *a[2:]).astype(jnp.float32).sum(), 2))
    exact = grad(*(x.astype(jnp.float32) for x in args))[0]
    found = grad(*args)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0].astype(np.float32), exact, rtol=0.02)


@pytest.mark.parametrize("top_k", [1, 3])
def test_output_and_side_terms_are_ten_lines_of_numpy(top_k):
    """Every token by itself; padding is transformed and not counted."""
    x, _, present = example()
    graph, state = layer(top_k=top_k, balance=0.02, z=0.005)
    out, sides = jax.jit(lambda state, x: nnx.merge(graph, state)(x, present))(state, x)
    inner, gate, outer = (np.asarray(state[name].get_value()) for name in ("inner", "gate", "outer"))
    router = np.asarray(state["router"]["kernel"].get_value())
    silu = lambda v: v / (1 + np.exp(-v))
    expected, chosen, mean, z = np.zeros(out.shape), np.zeros((B, E)), np.zeros((B, E)), 0.0
    for place in np.ndindex(B, S):
        v = np.asarray(x)[place]
        logits = v @ router
        share = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-share)[:top_k]
        expected[place] = sum(share[e] * (silu(v @ inner[e]) * (v @ gate[e])) @ outer[e] for e in best)
        if present[place]:
            chosen[place[0], best] += 1
            mean[place[0]] += share
            z += np.log(np.exp(logits).sum()) ** 2
    tokens = int(present.sum())
    np.testing.assert_allclose(out, expected, atol=1e-11)
    value = E * (chosen.sum(0) / (top_k * tokens) * mean.sum(0) / tokens).sum()
    np.testing.assert_allclose(term(sides["balance"]), value, rtol=1e-12)
    np.testing.assert_allclose(term(sides["z"]), z / tokens, rtol=1e-12)
    assert (sides["balance"].coefficient, sides["z"].coefficient) == (0.02, 0.005)
    by_row = present.sum(1)[:, None]
    sequences = E * (chosen / (top_k * by_row) * mean / by_row).sum(-1).mean()
    for over, scope, wanted in (
        ("tokens", "batch", top_k * value),
        ("choices", "micro_batch", value),
        ("tokens", "micro_batch", top_k * value),
        ("choices", "sequence", sequences),
        ("tokens", "sequence", top_k * sequences),
    ):
        graph, _ = layer(top_k=top_k, balance_over=over, balance_scope=scope)
        _, sides = nnx.merge(graph, state)(x, present)
        np.testing.assert_allclose(term(sides["balance"]), wanted, rtol=1e-12, err_msg=f"{over} {scope}")


def term(side):
    """What a side term adds to the loss, over its coefficient."""
    fixed = 1 if side.fixed is None else side.fixed / side.weight
    return (fixed * side.total / side.weight).sum()


@pytest.mark.parametrize("scope", ["batch", "micro_batch", "sequence"])
def test_an_even_router_is_balanced_at_one(scope):
    """The balance term's smallest value, and k by tokens; a row without tokens counts for nothing."""
    x, _, present = example()
    present = present.at[1].set(False)
    for over, value in (("choices", 1), ("tokens", E)):
        graph, state = layer(top_k=E, balance_over=over, balance_scope=scope)
        state["router"]["kernel"].set_value(jnp.zeros((D, E)))
        _, sides = nnx.merge(graph, state)(x, present)
        assert float(term(sides["balance"])) == pytest.approx(value)


def test_what_has_no_room_is_dropped_and_counted():
    """Later tokens first, padding before all others; what is dropped has no result and no gradient."""
    x, _, _ = example(same=True)
    present = jnp.ones((B, S), bool).at[0, :2].set(False)
    graph, state = layer(top_k=1, form="capacity", capacity=1.0)
    out, sides = nnx.merge(graph, state)(x, present)
    # All 15 go to one expert, which takes 4 of the 13 that are there: the first of the first row.
    kept = np.zeros((B, S), bool)
    kept[0, 2:] = kept[1, 0] = True
    assert (np.abs(out).max(-1) > 0).tolist() == kept.tolist()
    assert sides["experts"].chosen.sum() == sides["experts"].chosen.max() == 13
    np.testing.assert_array_equal(sides["experts"].dropped, 9 * (sides["experts"].chosen > 0))
    by_x = jax.grad(lambda x: (nnx.merge(graph, state)(x, present)[0] ** 2).sum())(x)
    assert (np.abs(by_x).max(-1) > 0).tolist() == kept.tolist()
    assert nnx.merge(graph, state).couples_rows == "Experts.form = 'blocks'"
    assert not nnx.merge(layer()[0], state).couples_rows


RULES = {
    "data": data(),
    "fsdp": fsdp(),
    "tensor": fsdp_tensor(2),
    "sequence": fsdp_sequence(2, tensor=2),
    "expert": fsdp_expert(4),
    "expert and tensor": fsdp_expert(2, tensor=2),
    "expert and sequence": fsdp_expert(2, sequence=2),
}


@pytest.mark.parametrize("form", ["blocks", "ragged", "capacity"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_eight_devices_are_one(rules, form):
    """Outputs, side terms and all gradients, whatever is cut."""
    inputs, changes = example(rows=8, length=4), {"form": form, "capacity": 2.0 if form == "capacity" else None}
    expected = found(*inputs, **changes)
    place = rules.place()
    with place.scope():
        own = found(*inputs, **changes)
    assert_alike(own, expected)
    for a, b in zip(jax.tree.leaves(own[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_tokens_are_not_sorted_across_devices():
    """The compiled layer sends matrices' gradients and no states."""
    inputs = example(rows=8, length=16)
    graph, state = layer(form="blocks")
    place = data().place()
    with place.scope():
        at = tuple(place.rows(x.shape, "x") for x in inputs)
        loss = lambda state, x, pull, present: (nnx.merge(graph, state)(x, present)[0] * pull).sum()
        step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(None, *at), out_shardings=(place.replicated, at[0]))
        text = step.lower(state, *inputs).compile().as_text()
    sent = {shape for c in collectives(text, 8) if len(c.groups[0]) > 1 for shape in c.shapes}
    assert (E, D, 8) in sent
    assert not {s for s in sent if 16 in s or 8 * 16 in s or 2 * 8 * 16 in s}


def test_flops_are_those_of_the_choices():
    """Three products a choice forward, and twice that backward, however long the loop is."""
    shapes = [(40, 8), (40, 2), (40, 2), (5, 8, 3), (5, 8, 3), (5, 3, 8)]
    args = [jax.ShapeDtypeStruct(s, jnp.int32 if i == 2 else jnp.float32) for i, s in enumerate(shapes)]
    forward = FlopCount(2.0 * 80 * 3 * 8 * 3)
    assert forward_flops(partial(blocks, "silu"), *args) == forward
    pulled = jax.grad(lambda *a: jnp.sin(blocks("silu", *a)).sum(), (0, 1, 3, 4, 5))
    assert executed_flops(pulled, *args) == 3 * forward


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 5}, r"Experts\.top_k = 5 is more than the 4 experts"),
        ({"top_k": 0}, r"Experts\.top_k = 0: expected 1 or more"),
        ({"shared_gate": True}, "shared_gate without"),
        ({"form": "capacity"}, r"Experts\.form = 'capacity' with Experts\.capacity = None: expected"),
        ({"form": "blocks", "capacity": 1.25}, r"Experts\.form = 'blocks' with Experts\.capacity = 1\.25: expected"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    """By name."""
    with pytest.raises(UserError, match=words):
        Experts(D, experts=E, rngs=nnx.Rngs(0), **changes)


def test_a_capacity_below_one_token():
    """Two choices of four experts at 1.25."""
    x, _, present = example(rows=1, length=1)
    graph, state = layer(form="capacity", capacity=1.25)
    with pytest.raises(
        UserError, match=r"Experts\.capacity = 1\.25: 2 choices of 4 experts give 0\.62 tokens an expert"
    ):
        nnx.merge(graph, state)(x, present)


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
