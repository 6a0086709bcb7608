"""A dense model as experts that are all alike, and experts as a dense model: the same function both ways."""

from __future__ import annotations

from functools import partial

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
    HashRouter,
    RMSNorm,
    SigmoidRouter,
    TopKRouter,
    Trunk,
    merge_experts,
    upcycle,
)
from models.stack import unstack
from models.variables import flatten, replace_values
from partitioning import UserError

TOKENS = jnp.asarray(np.random.default_rng(0).integers(6, VOCABULARY.size, (1, S)), jnp.int32)
DENSE = partial(FeedForward, hidden=12, gated=True, activation="silu")
ROUTERS = {
    "softmax": {},
    "sigmoid": {"router": partial(SigmoidRouter, rate=0.0)},
    "hash": {"router": HashRouter},
}


def trunk(forward=DENSE, scan=True, **options):
    """A decoder whose weights are far from small."""
    block = partial(Block, mixer=partial(Attention, heads=2), norm=RMSNorm, feed_forward=forward)
    made = Trunk(VOCABULARY, width=8, layers=3, pattern=[block], scan=scan, rngs=nnx.Rngs(0), **options)
    replace_values(made, {n: x if n.endswith("scale") else 5 * x for n, x in flatten(made, nnx.Param).items()})
    return made


def states(model):
    return np.asarray(
        model(
            TOKENS, segments=jnp.asarray(SEGMENTS)[None], positions=jnp.asarray(POSITIONS)[None], mask=Causal()
        ).hidden
    )


def by_layer(model):
    return unstack({name: np.asarray(x) for name, x in flatten(model, nnx.Param).items()})


@pytest.mark.parametrize(("kind", "scan"), [("softmax", True), ("softmax", False), ("sigmoid", True), ("hash", True)])
def test_a_dense_model_is_its_experts(kind, scan):
    """States to rounding, routers that differ from layer to layer, and the dense model again from the mean, bit for bit."""
    dense, options = trunk(scan=scan), ROUTERS[kind]
    before = by_layer(dense)
    sparse = upcycle(dense, experts=4, top_k=2, rngs=nnx.Rngs(1), **options)
    expected = states(dense)
    np.testing.assert_allclose(states(sparse), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    leaves = by_layer(sparse)
    assert leaves["stack/layers/2/feed_forward/inner"].shape == (4, 8, 12)
    routers = [x for name, x in leaves.items() if "router/kernel" in name]
    assert len({x.tobytes() for x in routers}) == len(routers)
    back = by_layer(merge_experts(sparse))
    assert back.keys() == before.keys() == by_layer(dense).keys()
    for name, value in before.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
        np.testing.assert_array_equal(by_layer(dense)[name], value, err_msg=name)


def test_layers_that_have_experts_keep_them():
    """In a pattern of dense layers and experts, only the former change; head layers too."""
    mixed = [partial(Block, mixer=partial(Attention, heads=2), norm=RMSNorm, feed_forward=f) for f in (DENSE, Experts)]
    made = Trunk(VOCABULARY, width=8, layers=5, pattern=mixed, head_blocks=mixed[:1], rngs=nnx.Rngs(0))
    before, after = by_layer(made), by_layer(upcycle(made, experts=4, top_k=1, rngs=nnx.Rngs(1)))
    assert [i for i in range(5) if f"stack/layers/{i}/feed_forward/router/kernel" in before] == [2, 4]
    assert all(f"stack/layers/{i}/feed_forward/router/kernel" in after for i in range(5))
    for name in (n for n in before if "layers/2/" in n or "layers/4/" in n):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_scale_and_shared_expert_are_merged_too():
    """Experts that are alike, with a scale and another expert beside them, give one dense layer of the same function."""
    router = partial(TopKRouter, renormalise=True, scale=2.5)
    sparse = upcycle(trunk(), experts=3, top_k=2, rngs=nnx.Rngs(1), router=router, shared=5)
    dense = merge_experts(sparse)
    assert by_layer(dense)["stack/layers/0/feed_forward/outer"].shape == (17, 8)
    expected = states(sparse)
    np.testing.assert_allclose(states(dense), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(states(trunk()) - expected).max() > 0.1


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_a_mean_by_load(scan):
    """Each layer by its own loads, which need not add up to 1."""
    sparse = trunk(partial(Experts, experts=3, hidden=4), scan=scan)
    loads = {0: [1, 0, 0], 1: [0, 2, 6], 2: [5, 5, 5]}
    found, values = by_layer(merge_experts(sparse, loads=loads)), by_layer(sparse)
    even = by_layer(merge_experts(sparse))
    for i, given in loads.items():
        for name in ("inner", "gate", "outer"):
            at = f"stack/layers/{i}/feed_forward/{name}"
            expected = np.tensordot(np.array(given) / sum(given), values[at], 1)
            np.testing.assert_allclose(found[at], expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(even[at], values[at].mean(0), rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused():
    make, sparse = partial(upcycle, experts=4, top_k=2, rngs=nnx.Rngs(0)), trunk(partial(Experts, experts=3))
    for forward in (FeedForward, partial(DENSE, bias=True), partial(DENSE, inner_norm=RMSNorm)):
        with pytest.raises(UserError, match="gated, without biases"):
            make(trunk(forward))
    with pytest.raises(UserError, match="nothing to upcycle"):
        make(sparse)
    with pytest.raises(UserError, match="nothing to merge"):
        merge_experts(trunk())
    with pytest.raises(UserError, match="shared expert's result is gated"):
        merge_experts(trunk(partial(Experts, shared=4, shared_gate=True)))
    for loads in ({0: [1, 1, 1]}, {i: [1, 1] for i in range(3)}, {i: [0, 0, 0] for i in range(3)}):
        with pytest.raises(UserError, match=r"loads\[[01]\] = .*: expected the loads of 3 experts"):
            merge_experts(sparse, loads=loads)
