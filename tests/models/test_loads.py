"""What is counted of experts' use: against numpy for every router, by layer however the stack is scanned, and in words."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from awkward import TRUNK, VOCABULARY
from flax import nnx

from models import (
    Block,
    Causal,
    ExpertChoice,
    Experts,
    HashRouter,
    MaskedRouter,
    SigmoidRouter,
    TopKRouter,
    WarmUpRouter,
)
from models.loads import Load, Loads, named
from models.mixture.routing import Picks
from models.side import Tally

V, E, ROWS, S = VOCABULARY.size, 4, 6, 8
DRAW = np.random.default_rng(0)
TOKENS = DRAW.integers(6, V, (ROWS, S))
SEGMENTS = np.where(np.arange(S) < DRAW.integers(2, S, (ROWS, 1)), 1, 0)
WHERE = {
    "segments": jnp.asarray(SEGMENTS),
    "positions": jnp.tile(jnp.arange(S, dtype=jnp.int32), (ROWS, 1)),
}
KINDS = {
    "top-k": TopKRouter,
    "sigmoid": SigmoidRouter,
    "warm-up": WarmUpRouter,
    # Rare ids see one expert, and their second choice is none.
    "masked": partial(MaskedRouter, frequencies=np.arange(V, 0, -1.0), share=0.5),
    "hash": partial(HashRouter, vocabulary=V),
    "experts choose": ExpertChoice,
}


# Experts that choose all have room.
@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, None) for kind in KINDS), *((kind, "capacity") for kind in KINDS if "choose" not in kind)],
)
def test_choices_are_counted_as_in_numpy(kind, form):
    """Those of tokens that are there, and not of an expert that is hidden from them; and of each expert those without room."""
    seen = {}

    def spied(width, **options):
        router = KINDS[kind](width, **options)
        if hasattr(router, "bias"):
            router.bias.set_value(jnp.arange(E) / 200)
        call = type(router).__call__

        def noted(self, x, present, context=None):
            seen["routing"] = call(self, x, present, context)
            return seen["routing"]

        router.__class__ = type("Spied", (type(router),), {"__call__": noted})
        return router

    experts = partial(Experts, experts=E, hidden=8, router=spied, form=form, capacity=None if form is None else 0.4)
    made = TRUNK(VOCABULARY, layers=1, feed_forward=experts, rngs=nnx.Rngs(0))
    mask = None if kind == "experts choose" else Causal()
    (tally,) = made(jnp.asarray(TOKENS), mask=mask, **WHERE).tallies.values()
    routing, present = seen["routing"], SEGMENTS > 0
    chosen, dropped, room = np.zeros(E), np.zeros(E), np.full(E, np.ceil(0.4 * ROWS * S * 2 / E))
    if isinstance(routing, Picks):
        for b, e in np.ndindex(ROWS, E):
            chosen[e] += present[b, routing.slots[b, e]].sum()
    else:
        for place in np.ndindex(ROWS, S):
            for e in np.asarray(routing.chosen[place]):
                hidden = kind == "masked" and not np.isfinite(routing.logits[*place, e])
                # What is hidden from a token takes room as its other choices do, and is none.
                room[e] -= present[place]
                chosen[e] += present[place] and not hidden
                dropped[e] += present[place] and not hidden and room[e] < 0
    assert chosen.min() > 0
    np.testing.assert_array_equal(tally.chosen, chosen)
    if form is None:
        assert tally.dropped is None
    else:
        assert dropped.sum() > 0
        np.testing.assert_array_equal(tally.dropped, dropped)
    assert (tally.bias is None) == (kind != "sigmoid")
    if tally.bias is not None:
        np.testing.assert_allclose(
            Loads({"trunk/layers/0/experts": tally}).layers["trunk/layers/0"].bias, np.arange(E) / 200, rtol=1e-6
        )


def test_layers_have_their_index_however_they_are_scanned():
    """Of a pattern with dense layers between, and a head."""
    shared = {name: TRUNK.keywords[name] for name in ("mixer", "norm", "feed_forward")}
    dense, mixed = (
        partial(Block, **shared | more) for more in ({}, {"feed_forward": partial(Experts, experts=E, hidden=8)})
    )
    found = {}
    for scan in (True, False):
        made = partial(TRUNK, layers=6, pattern=[dense, mixed], head_blocks=[mixed], scan=scan)
        tallies = made(VOCABULARY, rngs=nnx.Rngs(0))(jnp.asarray(TOKENS), mask=Causal(), **WHERE).tallies
        found[scan] = Loads({f"trunk/{name}": tally for name, tally in tallies.items()}).layers
    assert list(found[True]) == list(found[False]) == [f"trunk/layers/{i}" for i in (0, 2, 4)]
    for name, load in found[True].items():
        np.testing.assert_array_equal(load.tally.chosen, found[False][name].tally.chosen)
    assert len({tuple(load.tally.chosen.tolist()) for load in found[True].values()}) == 3


def test_figures_by_hand():
    """Loads 1/2, 1/4, 1/4, 0 and even ones; what is never chosen is named."""
    tallies = {
        "trunk/scanned/0/experts": Tally(
            chosen=np.array([[8.0, 4, 4, 0], [4, 4, 4, 4]]),
            dropped=np.array([[4.0, 0, 0, 0], [0, 0, 0, 0]]),
            bias=np.array([[0.2, 0.4, -0.6, 0.0], [0, 0, 0, 0]]),
            calls=np.array([2.0, 2.0]),
            layers=(1, 3),
        ),
        "teacher/layers/10/experts": Tally(np.array([0.0, 5.0]), layers=(10,)),
        "teacher/layers/9/experts": Tally(np.array([0.0, 0.0]), layers=(9,)),
    }
    loads = Loads(tallies)
    assert list(loads.layers) == ["teacher/layers/9", "teacher/layers/10", "trunk/layers/1", "trunk/layers/3"]
    found = loads.figures()
    first = "experts/trunk/layers/1"
    np.testing.assert_allclose(found[f"{first}/load"], [0.5, 0.25, 0.25, 0])
    np.testing.assert_allclose(found[f"{first}/dropped"], [0.25, 0, 0, 0])
    np.testing.assert_allclose(found[f"{first}/bias"], [0.1, 0.2, -0.3, 0])
    numbers = {"entropy": 0.75, "largest": 2.0, "least": 0.0, "unused": 1.0}
    assert {name: found[f"{first}/{name}"] for name in numbers} == pytest.approx(numbers)
    whole = {"entropy": 0.875, "largest": 2.0, "dropped": 0.125}
    assert {name: found[f"experts/trunk/{name}"] for name in whole} == pytest.approx(whole)
    assert found["experts/teacher/layers/10/entropy"] == 0
    assert np.isnan(found["experts/teacher/layers/9/load"]).all()
    assert loads.layers["teacher/layers/9"].unused == []
    assert Loads({name: tally for name, tally in tallies.items() if "trunk" in name}).words() == (
        "expert entropy 0.88, largest load 2.0x, dropped 12.5%"
    )
    assert loads.table()[3] == ("trunk/layers/1", "0.7500", "2.00", "0.00", "1 of 4", "25.00%", "-0.3000 to +0.2000")
    assert Load(Tally(np.array([3.0]))).entropy == 1
    assert Loads({}).figures() == {}


def test_experts_are_named_by_runs():
    assert named("expert", "trunk/layers/3", [0, 1, 2, 3, 7, 9, 10]) == "trunk, layer 3: experts 0-3, 7, 9, 10"
    assert named("expert", "trunk/encoder/layers/0", [5]) == "trunk/encoder, layer 0: expert 5"
