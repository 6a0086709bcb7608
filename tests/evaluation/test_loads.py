"""Whom held-out tokens choose: each token once, whatever the batches and devices, and in words."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from held_out import VOCABULARY, records

from evaluation import CausalPerplexity, MaskedLikelihood
from models import Attention, Causal, Experts, SigmoidRouter, Trunk
from training.judging import arrays, lines

from .conftest import judging

E, LENGTH = 5, 16


@pytest.fixture(scope="module")
def trunk():
    """Two layers of experts, of which the second layer's fourth is never chosen."""
    experts = partial(Experts, experts=E, hidden=8, router=SigmoidRouter)
    made = Trunk(
        VOCABULARY, width=16, layers=2, mixer=partial(Attention, heads=2), feed_forward=experts, rngs=nnx.Rngs(0)
    )
    router = made.stack.scanned["0"].feed_forward.router
    router.kernel.set_value(30 * router.kernel.get_value())
    router.bias.set_value(jnp.asarray([[0.0, 0.1, -0.1, 0.0, 0.0], [0.0, 0.0, 0.0, -9.0, 0.0]]))
    return made


def test_every_token_that_is_read_counts_once(trunk, rows):
    """One row at a time or many on many devices; padding and rows past the end count nothing."""
    counts, tokens = np.zeros((2, E)), 0
    run = jax.jit(lambda tokens, **call: trunk(tokens, mask=Causal(), **call).tallies)
    for row in rows(records(), LENGTH):
        call = {name: jnp.asarray(row[name])[None] for name in ("tokens", "segments", "positions")}
        (tally,) = run(**call).values()
        counts += np.asarray(tally.chosen)
        tokens += np.count_nonzero(row["segments"])
    assert counts.sum(-1).tolist() == [2 * tokens] * 2
    judge = judging(trunk)
    for batch, devices in ((3, 1), (8, 8)):
        loads = judge(CausalPerplexity(data=records(), length=LENGTH, batch_size=batch), devices=devices)["causal"]
        assert [load.tally.chosen.tolist() for load in loads.layers.values()] == counts.tolist()
    assert list(loads.layers) == ["trunk/layers/0", "trunk/layers/1"]
    np.testing.assert_allclose(loads.layers["trunk/layers/0"].bias, [0, 0.1, -0.1, 0, 0], rtol=1e-6)
    assert counts[1, 3] == 0
    found = judge(MaskedLikelihood(data=records(), length=LENGTH, rate=0.5))["masked"]
    # Other tokens are seen, and as many of them.
    assert found.layers["trunk/layers/0"].tally.chosen.sum() == counts[0].sum()

    shown = lines({"causal/perplexity": 2.0, "causal": loads})
    assert shown[0] == "causal/perplexity    2.0000"
    assert shown[1].split() == ["causal", "layer", "entropy", "largest/mean", "least/mean", "unused", "dropped", "bias"]
    assert shown[2].startswith("causal  trunk/layers/0  0.")
    assert shown[3].split()[5:] == ["1", "of", "5", "-9.0000", "to", "+0.0000"]
    assert shown[4:] == ["causal: trunk, layer 1: expert 3: no token in all that was read"]
    figures = arrays({"causal": loads})
    np.testing.assert_allclose(figures["causal/experts/trunk/layers/1/load"], counts[1] / counts[1].sum())
    assert figures["causal/experts/trunk/layers/1/unused"] == 1
